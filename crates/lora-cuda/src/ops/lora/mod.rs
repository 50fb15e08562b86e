//! The LoRA term of the output of a base layer.

pub mod adapters;
pub mod args;
pub mod checks;
pub mod cluster_shrink;
pub mod expand;
pub mod gated;
pub mod plan;
pub mod route;
pub mod segments;
pub mod shrink;
pub mod table;
pub mod token_rows;
pub mod work;

use lora_core::lora::{LoraSite, SiteKind};
use lora_core::{Result, check, check_extent};

use self::adapters::SiteAdapters;
use self::checks::{check_linear, check_plan};
use self::expand::{Output, expand};
use self::plan::CudaLoraPlan;
use self::route::{Fusion, LoraShape, Route, SiteInput};
use self::shrink::shrink;
use self::token_rows::replace_rows;
use crate::args::DeviceMat;
use crate::device::{Cuda, View, ViewMut};
use crate::library::cublaslt::Beta;
use crate::memory::queue::CudaQueue;
use crate::ops::linear::choice::{Gemm, GemmShape};
use crate::ops::linear::quantise::{Input, input};
use crate::ops::linear::weights::CudaLinear;
use crate::ops::linear::{gemm, linear, lt, stream, tiles};

/// A site and the plan of a step's adapters.
#[derive(Clone, Copy)]
pub struct Lora<'a> {
    /// The site.
    pub site: &'a LoraSite<Cuda>,
    /// The plan.
    pub plan: &'a CudaLoraPlan,
}

impl<'a> Lora<'a> {
    /// What the choice of kernels depends on.
    fn shape(&self, q: &CudaQueue, input: SiteInput, out: DeviceMat) -> LoraShape<'a> {
        let (table, step) = (&self.site.table, self.plan.shape());
        LoraShape {
            x: match input {
                SiteInput::Rows(x) => Some(x.layout()),
                SiteInput::Tokens(_) => None,
            },
            out: out.layout(),
            spec: &self.site.spec,
            work: table.work(),
            has_token_rows: table.token_rows().is_some(),
            step,
            // A recorded step may find other adapters when it is replayed.
            segments: if q.is_recording() {
                table.slots().min(step.max_segments())
            } else {
                step.segments
            },
        }
    }
}

/// See [`lora_core::Backend::lora_add`].
pub fn lora_add(
    cuda: &Cuda,
    q: &mut CudaQueue,
    x: View<'_>,
    lora: Lora<'_>,
    out: &ViewMut<'_>,
) -> Result<()> {
    check_linear(&x, lora.site, out)?;
    apply(cuda, "lora_add", q, SiteInput::Rows(x.into()), lora, out.into())
}

/// See [`lora_core::Backend::lora_embed`].
pub fn lora_embed(
    cuda: &Cuda,
    q: &mut CudaQueue,
    ids: View<'_>,
    lora: Lora<'_>,
    out: &ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "lora_embed";
    let spec = &lora.site.spec;
    check::site_output::<Cuda>(OP, spec, SiteKind::Embedding, out.layout)?;
    check_extent(OP, "rows of out", out.layout.rows, check::id_row(OP, "ids", ids.layout)?)?;
    cuda.check_ids(q, [OP, "token id"], ids, spec.in_dim)?;
    apply(cuda, OP, q, SiteInput::Tokens(ids.into()), lora, out.into())
}

/// Replaces rows of the vocabulary, then adds low-rank updates.
fn apply(
    cuda: &Cuda,
    op: &'static str,
    q: &mut CudaQueue,
    input: SiteInput,
    lora: Lora<'_>,
    out: DeviceMat,
) -> Result<()> {
    let Lora { site, plan } = lora;
    replace_rows(cuda, op, q, input, site, plan, out)?;
    check_plan(cuda, op, q, site, plan, out.layout().rows)?;
    let shape = lora.shape(q, input, out);
    let Some(low_rank) = shape.low_rank() else { return Ok(()) };
    let adapters = SiteAdapters::new(q, input, site, plan, out, &shape, low_rank)?;
    shrink(cuda, q, &adapters)?;
    expand(cuda, q, &adapters, Output::Base)
}

/// See [`lora_core::Backend::linear_lora`].
pub fn linear_lora(
    cuda: &Cuda,
    q: &mut CudaQueue,
    x: View<'_>,
    w: &CudaLinear,
    lora: Lora<'_>,
    out: &ViewMut<'_>,
) -> Result<()> {
    check_linear(&x, lora.site, out)?;
    check::linear(x.layout, w.dims(), out.layout)?;
    let input = SiteInput::Rows(x.into());
    let shape = lora.shape(q, input, out.into());
    let gemm = GemmShape { x: x.layout, w: w.shape(), out: out.layout };
    let route = route::choose(&gemm, &shape, cuda.multiprocessors);
    if route == Route::Separate {
        linear(cuda, q, x, w, out)?;
        return lora_add(cuda, q, x, lora, out);
    }
    check_plan(cuda, "linear_lora", q, lora.site, lora.plan, out.layout.rows)?;
    let Route::Adapted(low_rank, fusion) = route else { return linear(cuda, q, x, w, out) };
    let (site, plan) = (lora.site, lora.plan);
    let adapters = SiteAdapters::new(q, input, site, plan, out.into(), &shape, low_rank)?;
    adapted(cuda, q, x.into(), w, &adapters, fusion, out.into())
}

/// The projection and its adapters.
fn adapted(
    cuda: &Cuda,
    q: &mut CudaQueue,
    x: DeviceMat,
    w: &CudaLinear,
    adapters: &SiteAdapters<'_>,
    fusion: Fusion,
    out: DeviceMat,
) -> Result<()> {
    match fusion {
        Fusion::Tiles => {
            shrink(cuda, q, adapters)?;
            tiles::gemm(cuda, q, x, w, adapters.many_rows(), out)
        }
        Fusion::BeginByTiles => {
            shrink(cuda, q, adapters)?;
            tiles::begin(cuda, q, adapters.many_rows(), out)?;
            let input = input(cuda, q, x, w)?;
            add_gemm(cuda, q, &input, w, adapters, out)
        }
        Fusion::Begin => {
            let input = input(cuda, q, x, w)?;
            shrink(cuda, q, adapters)?;
            expand(cuda, q, adapters, Output::Empty)?;
            add_gemm(cuda, q, &input, w, adapters, out)
        }
        Fusion::Stream => {
            let input = input(cuda, q, x, w)?;
            // The last kernel before the GEMM, which polls its ready flag.
            shrink(cuda, q, adapters)?;
            stream::gemm(cuda, q, &input, w, Some(adapters.few_rows()), out)
        }
        Fusion::AfterGemm(kernel) => {
            let input = input(cuda, q, x, w)?;
            shrink(cuda, q, adapters)?;
            gemm(cuda, q, kernel, &input, w, out)?;
            expand(cuda, q, adapters, Output::Base)
        }
    }
}

/// Adds the product to an output that begins with the LoRA term. Where cuBLASLt turns out to have no algorithm
/// for that, the output is written anew.
fn add_gemm(
    cuda: &Cuda,
    q: &mut CudaQueue,
    input: &Input,
    w: &CudaLinear,
    adapters: &SiteAdapters<'_>,
    out: DeviceMat,
) -> Result<()> {
    if lt::gemm(cuda, q, input, w, Beta::One, out)? {
        return Ok(());
    }
    gemm(cuda, q, Gemm::Lt, input, w, out)?;
    expand(cuda, q, adapters, Output::Base)
}
