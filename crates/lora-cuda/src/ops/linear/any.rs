//! GEMMs of any shape and dtype, without tensor cores.
#![allow(unsafe_code)]

use lora_core::Result;

use super::quantise::Input;
use super::weights::CudaLinear;
use crate::args::{Address, DeviceMat, KernelArgs, MatArg, assert_layout};
use crate::device::Cuda;
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;
use crate::ops::common::{ROW_THREADS, WARP};

#[repr(C)]
#[derive(Clone, Copy)]
struct LinearArgs {
    x: MatArg,
    w: MatArg,
    out: MatArg,
    x_scales: Address,
    w_scales: Address,
    bias: Address,
}

assert_layout!(LinearArgs is 120 bytes: x at 0, x_scales at 96, bias at 112);

// SAFETY: laid out as `LinearArgs` of `linear.cu`.
unsafe impl KernelArgs for LinearArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::Linear];
}

/// Rows that a warp takes together, as in `linear.cu`.
const ROWS: usize = 8;

/// `out = x wᵀ + bias`.
pub fn gemm(
    cuda: &Cuda,
    q: &mut CudaQueue,
    input: &Input,
    w: &CudaLinear,
    out: DeviceMat,
) -> Result<()> {
    let args = LinearArgs {
        x: input.x.into(),
        w: w.mat().into(),
        out: out.into(),
        x_scales: input.row_scales_or_null(),
        w_scales: w.w_scales(),
        bias: w.bias(),
    };
    let outputs = out.layout().cols.div_ceil(ROW_THREADS / WARP);
    let launch = Launch::new([outputs, out.layout().rows.div_ceil(ROWS), 1], ROW_THREADS);
    cuda.launch(q, Kernel::Linear, launch, args)
}
