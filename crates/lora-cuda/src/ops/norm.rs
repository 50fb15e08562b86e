//! Root-mean-square norms.
#![allow(unsafe_code)]

use lora_core::ops::NormWeight;
use lora_core::{MatLayout, Result, check};

use super::lora::checks::check_slots;
use crate::args::{Address, KernelArgs, MatArg, address, assert_layout};
use crate::device::{Cuda, View, ViewMut};
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;
use crate::ops::common::{MAX_THREADS, ROW_THREADS, VEC8, WARP, is_vec8};

/// `NormWeight` of `lora.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct NormWeightArg {
    base: Address,
    adapters: Address,
    slots: Address,
}

assert_layout!(NormWeightArg is 24 bytes: base at 0, adapters at 8, slots at 16);

impl From<&NormWeight<'_, Cuda>> for NormWeightArg {
    /// Without adapters as long as none has a weight of its own, so that kernels need not look.
    fn from(w: &NormWeight<'_, Cuda>) -> Self {
        let base = address(w.base);
        match w.lora.filter(|(site, _)| site.table.has_adapters()) {
            Some((site, plan)) => {
                Self { base, adapters: site.table.rows(), slots: plan.parts().slot_of_row.data() }
            }
            None => Self { base, ..Self::default() },
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormArgs {
    x: MatArg,
    residual: MatArg,
    out: MatArg,
    w: NormWeightArg,
    eps: f32,
}

assert_layout!(NormArgs is 128 bytes: x at 0, residual at 32, out at 64, w at 96, eps at 120);

// SAFETY: laid out as `NormArgs` of `norm.cu`.
unsafe impl KernelArgs for NormArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::RmsNorm, Kernel::AddRmsNorm, Kernel::RmsNormVec8];
}

/// See [`lora_core::Backend::rms_norm`].
pub fn rms_norm(
    cuda: &Cuda,
    q: &mut CudaQueue,
    x: View<'_>,
    w: &NormWeight<'_, Cuda>,
    eps: f32,
    out: &ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "rms_norm";
    check::norm(OP, x.layout, w, &[("out", out.layout)])?;
    check_norm_slots(cuda, OP, q, w)?;
    let (residual, w) = (MatArg::NONE, NormWeightArg::from(w));
    let args = NormArgs { x: x.into(), residual, out: out.into(), w, eps };
    let (kernel, launch) = choose(Kernel::RmsNorm, w.base, &[x.layout, out.layout]);
    cuda.launch(q, kernel, launch, args)
}

/// See [`lora_core::Backend::add_rms_norm`].
pub fn add_rms_norm(
    cuda: &Cuda,
    q: &mut CudaQueue,
    x: View<'_>,
    residual: &ViewMut<'_>,
    w: &NormWeight<'_, Cuda>,
    eps: f32,
    out: &ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "add_rms_norm";
    let outs = [("residual", residual.layout), ("out", out.layout)];
    check::norm(OP, x.layout, w, &outs)?;
    check_norm_slots(cuda, OP, q, w)?;
    let w = NormWeightArg::from(w);
    let args = NormArgs { x: x.into(), residual: residual.into(), out: out.into(), w, eps };
    let (kernel, launch) =
        choose(Kernel::AddRmsNorm, w.base, &[x.layout, residual.layout, out.layout]);
    cuda.launch(q, kernel, launch, args)
}

/// Checks the slots of rows whose adapters may have weights of their own.
pub fn check_norm_slots(
    cuda: &Cuda,
    op: &'static str,
    q: &mut CudaQueue,
    w: &NormWeight<'_, Cuda>,
) -> Result<()> {
    w.lora.map_or(Ok(()), |(site, plan)| check_slots(cuda, op, q, site, plan))
}

/// Alignment of weights that are loaded eight at a time.
const ALIGNMENT: Address = (VEC8 * size_of::<f32>()) as Address;

/// The kernel that keeps rows in registers where they are short enough, else `general`.
fn choose(general: Kernel, w: Address, operands: &[MatLayout]) -> (Kernel, Launch) {
    let (rows, cols) = operands.first().map_or((0, 0), |layout| (layout.rows, layout.cols));
    let threads = cols.div_ceil(VEC8).next_multiple_of(WARP);
    let even = cols.is_multiple_of(VEC8) && w.is_multiple_of(ALIGNMENT);
    if is_vec8(operands) && even && threads <= MAX_THREADS {
        (Kernel::RmsNormVec8, Launch::new([rows, 1, 1], threads))
    } else {
        (general, Launch::new([rows, 1, 1], ROW_THREADS))
    }
}
