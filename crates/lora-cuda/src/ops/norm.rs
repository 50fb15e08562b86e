//! Root-mean-square norms.
#![allow(unsafe_code)]

use lora_core::{Mat, Result, check};

use super::{EIGHT, MOST_THREADS, ROW_THREADS, WARP, in_eights};
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::queue::Launch;
use crate::{Cuda, CudaQueue, View, ViewMut};

#[repr(C)]
#[derive(Clone, Copy)]
struct NormArgs {
    x: MatArg,
    residual: MatArg,
    out: MatArg,
    w: Address,
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
        (x, w): (View<'_>, View<'_>),
        eps: f32,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        check::norm("rms_norm", x.geo, w.geo, &[("out", out.geo)])?;
        let (residual, w) = (MatArg::NONE, MatArg::from(w).data());
        let args = NormArgs { x: x.into(), residual, out: out.into(), w, eps };
        let (kernel, launch) = choose(Kernel::RmsNorm, w, &[x.geo, out.geo]);
        q.launch(&self.modules, kernel, launch, args)
    }

    /// See [`lora_core::Backend::add_rms_norm`].
    pub(crate) fn add_norm(
        &self,
        q: &mut CudaQueue,
        (x, w): (View<'_>, View<'_>),
        eps: f32,
        [residual, out]: [&ViewMut<'_>; 2],
    ) -> Result<()> {
        let outs = [("residual", residual.geo), ("out", out.geo)];
        check::norm("add_rms_norm", x.geo, w.geo, &outs)?;
        let w = MatArg::from(w).data();
        let args = NormArgs { x: x.into(), residual: residual.into(), out: out.into(), w, eps };
        let (kernel, launch) = choose(Kernel::AddRmsNorm, w, &[x.geo, residual.geo, out.geo]);
        q.launch(&self.modules, kernel, launch, args)
    }
}

/// What the address of weights must be a multiple of to be loaded eight at a time.
const ALIGNMENT: Address = (EIGHT * size_of::<f32>()) as Address;

/// The kernel that keeps rows in registers where they are short enough, else `general`.
fn choose(general: Kernel, w: Address, operands: &[Mat]) -> (Kernel, Launch) {
    let (rows, cols) = operands.first().map_or((0, 0), |geo| (geo.rows, geo.cols));
    let threads = cols.div_ceil(EIGHT).next_multiple_of(WARP);
    let even = cols.is_multiple_of(EIGHT) && w.is_multiple_of(ALIGNMENT);
    let suited = in_eights(operands) && even && threads <= MOST_THREADS;
    match suited {
        true => (Kernel::RmsNormEights, Launch::new([rows, 1, 1], threads)),
        false => (general, Launch::new([rows, 1, 1], ROW_THREADS)),
    }
}
