//! GEMMs of few rows, whose time goes into reading weights, with the LoRA term.
#![allow(unsafe_code)]

use lora_core::{Error, Result};

use super::fused_args::FewRows;
use super::quantise::Input;
use super::stream_cut::{Cut, SHARED, WARPGROUP, steps_of};
use super::weights::CudaLinear;
use crate::args::{Address, DeviceMat, KernelArgs, MatArg, assert_layout, dtype_number};
use crate::device::Cuda;
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;
use crate::ops::common::WARP;
use crate::tensor_map::TensorMap;

#[repr(C)]
#[derive(Clone, Copy)]
struct StreamArgs {
    w: TensorMap,
    x: TensorMap,
    out: MatArg,
    x_scales: Address,
    w_scales: Address,
    bias: Address,
    lora: FewRows,
    dtype: i32,
    steps: i32,
    stages: i32,
}

assert_layout!(
    StreamArgs is 448 bytes:
    w at 0, x at 128, out at 256, x_scales at 288, bias at 304, lora at 312, dtype at 392,
    stages at 400
);

// SAFETY: laid out as `StreamArgs` of `linear_stream.cu`.
unsafe impl KernelArgs for StreamArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::LinearStream];
}

/// `out = x wᵀ + bias` with the LoRA term, for operands that [`GemmShape::suits_stream`] says suit.
///
/// [`GemmShape::suits_stream`]: super::choice::GemmShape::suits_stream
pub fn gemm(
    cuda: &Cuda,
    q: &mut CudaQueue,
    input: &Input,
    w: &CudaLinear,
    lora: Option<FewRows>,
    out: DeviceMat,
) -> Result<()> {
    let absent = || Error::Device("weights that the TMA cannot read".to_owned());
    let map = w.stream_map().ok_or_else(absent)?;
    let (layout, rows) = (w.layout(), input.x.layout().rows);
    let steps = steps_of(layout);
    let cut = Cut::new(rows, layout.rows, steps, cuda.multiprocessors);
    let lora = lora.unwrap_or(FewRows::NONE);
    let args = StreamArgs {
        w: *map,
        x: TensorMap::of(input.x, cut.rows)?,
        out: out.into(),
        x_scales: input.row_scales_or_null(),
        w_scales: w.w_scales(),
        bias: w.bias(),
        lora,
        dtype: dtype_number(layout.dtype),
        steps: steps as i32,
        stages: cut.stages(lora.slices(), rows) as i32,
    };
    let launch = Launch {
        grid: [cut.clusters, 1, cut.cluster],
        // The warpgroups that multiply, the epilogue's, and two warps that load weights and inputs.
        threads: (cut.warpgroups + 1) * WARPGROUP + 2 * WARP,
        shared: SHARED,
        cluster: cut.cluster,
    };
    cuda.launch(q, Kernel::LinearStream, launch, args)
}
