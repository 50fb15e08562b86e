//! Root-mean-square norms.
#![allow(unsafe_code)]

use lora_core::ops::NormWeight;
use lora_core::{MatLayout, Result, check};

use super::{EIGHT, MAX_THREADS, ROW_THREADS, WARP, in_eights};
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::memory::queue::Launch;
use crate::{Cuda, CudaQueue, View, ViewMut};

/// `NormWeight` of `lora.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct NormWeightArg {
    base: Address,
    adapters: Address,
    slots: Address,
}

impl From<&NormWeight<'_, Cuda>> for NormWeightArg {
    /// While no adapter has a weight of its own, kernels are not told of adapters at all.
    fn from(w: &NormWeight<'_, Cuda>) -> Self {
        let base = MatArg::from(w.base).data();
        match w.lora.filter(|(site, _)| site.table.has_adapters()) {
            Some((site, batch)) => Self {
                base,
                adapters: site.table.rows(),
                slots: MatArg::from(batch.slot_of_row()).data(),
            },
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

// SAFETY: laid out as `NormArgs` of `norm.cu`.
unsafe impl KernelArgs for NormArgs {
    const KERNELS: &'static [Kernel] =
        &[Kernel::RmsNorm, Kernel::AddRmsNorm, Kernel::RmsNormEights];
}

impl Cuda {
    /// See [`lora_core::Backend::rms_norm`].
    pub(crate) fn norm(
        &self,
        q: &mut CudaQueue,
        (x, w): (View<'_>, &NormWeight<'_, Self>),
        eps: f32,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        const OP: &str = "rms_norm";
        check::norm(OP, x.layout, w, &[("out", out.layout)])?;
        self.check_norm_slots(OP, q, w)?;
        let (residual, w) = (MatArg::NONE, NormWeightArg::from(w));
        let args = NormArgs { x: x.into(), residual, out: out.into(), w, eps };
        let (kernel, launch) = choose(Kernel::RmsNorm, w.base, &[x.layout, out.layout]);
        q.launch(&self.modules, kernel, launch, args)
    }

    /// See [`lora_core::Backend::add_rms_norm`].
    pub(crate) fn add_norm(
        &self,
        q: &mut CudaQueue,
        (x, w): (View<'_>, &NormWeight<'_, Self>),
        eps: f32,
        [residual, out]: [&ViewMut<'_>; 2],
    ) -> Result<()> {
        const OP: &str = "add_rms_norm";
        let outs = [("residual", residual.layout), ("out", out.layout)];
        check::norm(OP, x.layout, w, &outs)?;
        self.check_norm_slots(OP, q, w)?;
        let w = NormWeightArg::from(w);
        let args = NormArgs { x: x.into(), residual: residual.into(), out: out.into(), w, eps };
        let (kernel, launch) =
            choose(Kernel::AddRmsNorm, w.base, &[x.layout, residual.layout, out.layout]);
        q.launch(&self.modules, kernel, launch, args)
    }

    /// Checks the slots of rows whose adapters may have weights of their own.
    pub(crate) fn check_norm_slots(
        &self,
        op: &'static str,
        q: &mut CudaQueue,
        w: &NormWeight<'_, Self>,
    ) -> Result<()> {
        w.lora.map_or(Ok(()), |(site, batch)| self.check_slots(op, q, site, batch))
    }
}

/// What the address of weights must be a multiple of to be loaded eight at a time.
const ALIGNMENT: Address = (EIGHT * size_of::<f32>()) as Address;

/// The kernel that keeps rows in registers where they are short enough, else `general`.
fn choose(general: Kernel, w: Address, operands: &[MatLayout]) -> (Kernel, Launch) {
    let (rows, cols) = operands.first().map_or((0, 0), |layout| (layout.rows, layout.cols));
    let threads = cols.div_ceil(EIGHT).next_multiple_of(WARP);
    let even = cols.is_multiple_of(EIGHT) && w.is_multiple_of(ALIGNMENT);
    let suited = in_eights(operands) && even && threads <= MAX_THREADS;
    match suited {
        true => (Kernel::RmsNormEights, Launch::new([rows, 1, 1], threads)),
        false => (general, Launch::new([rows, 1, 1], ROW_THREADS)),
    }
}
