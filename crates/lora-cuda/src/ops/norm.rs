//! Root-mean-square norms.
#![allow(unsafe_code)]

use lora_core::{Result, check};

use super::ROW_THREADS;
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
    const KERNELS: &'static [Kernel] = &[Kernel::RmsNorm, Kernel::AddRmsNorm];
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
        let launch = Launch::new([x.geo.rows, 1, 1], ROW_THREADS);
        q.launch(&self.modules, Kernel::RmsNorm, launch, args)
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
        let launch = Launch::new([x.geo.rows, 1, 1], ROW_THREADS);
        q.launch(&self.modules, Kernel::AddRmsNorm, launch, args)
    }
}
