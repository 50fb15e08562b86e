//! A projection with its adapters and its SwiGLU gate.

use lora_core::{Result, check};

use super::adapters::SiteAdapters;
use super::checks::{check_linear, check_plan};
use super::route::{GatedRoute, SiteInput, choose_gated};
use super::shrink::shrink;
use super::{Lora, linear_lora};
use crate::args::DeviceMat;
use crate::device::{Cuda, View, ViewMut};
use crate::memory::queue::CudaQueue;
use crate::ops::linear::choice::GemmShape;
use crate::ops::linear::weights::CudaLinear;
use crate::ops::linear::{linear, tiles};
use crate::ops::rows::silu_mul;

/// See [`lora_core::Backend::gated_linear_lora`].
pub fn gated_linear_lora(
    cuda: &Cuda,
    q: &mut CudaQueue,
    x: View<'_>,
    w: &CudaLinear,
    lora: Option<Lora<'_>>,
    gate_up: &ViewMut<'_>,
    out: &ViewMut<'_>,
) -> Result<()> {
    check::silu_mul(gate_up.layout, out.layout)?;
    check::linear(x.layout, w.dims(), gate_up.layout)?;
    let Some(lora) = lora else {
        return without_adapters(cuda, q, x, w, gate_up, out);
    };
    check_linear(&x, lora.site, gate_up)?;
    check_plan(cuda, "gated_linear_lora", q, lora.site, lora.plan, gate_up.layout.rows)?;
    let (input, both) = (SiteInput::Rows(x.into()), DeviceMat::from(gate_up));
    let (gemm, shape) = (gemm_shape(x, w, gate_up), lora.shape(q, input, both));
    let adapters = |q: &mut CudaQueue, low_rank| {
        SiteAdapters::new(q, input, lora.site, lora.plan, both, &shape, low_rank)
    };
    match choose_gated(&gemm, Some(&shape), out.layout, cuda.multiprocessors) {
        GatedRoute::Separate => {
            linear_lora(cuda, q, x, w, lora, gate_up)?;
            silu_mul(cuda, q, gate_up.as_view(), out)
        }
        GatedRoute::Tiles => tiles::gated_gemm(cuda, q, x.into(), w, None, out.into()),
        GatedRoute::TilesWithAdapters(low_rank) => {
            let adapters = adapters(q, low_rank)?;
            shrink(cuda, q, &adapters)?;
            tiles::gated_gemm(cuda, q, x.into(), w, Some(adapters.many_rows()), out.into())
        }
        GatedRoute::GateAfterGemm(low_rank) => {
            let adapters = adapters(q, low_rank)?;
            shrink(cuda, q, &adapters)?;
            linear(cuda, q, x, w, gate_up)?;
            tiles::gate(cuda, q, both, adapters.many_rows(), out.into())
        }
    }
}

fn without_adapters(
    cuda: &Cuda,
    q: &mut CudaQueue,
    x: View<'_>,
    w: &CudaLinear,
    gate_up: &ViewMut<'_>,
    out: &ViewMut<'_>,
) -> Result<()> {
    let gemm = gemm_shape(x, w, gate_up);
    if choose_gated(&gemm, None, out.layout, cuda.multiprocessors) == GatedRoute::Tiles {
        return tiles::gated_gemm(cuda, q, x.into(), w, None, out.into());
    }
    linear(cuda, q, x, w, gate_up)?;
    silu_mul(cuda, q, gate_up.as_view(), out)
}

fn gemm_shape(x: View<'_>, w: &CudaLinear, out: &ViewMut<'_>) -> GemmShape {
    GemmShape { x: x.layout, w: w.shape(), out: out.layout }
}
