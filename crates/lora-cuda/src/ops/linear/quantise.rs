//! Inputs rounded to e4m3, for weights in e4m3.
#![allow(unsafe_code)]

use lora_core::fp8::InputScale;
use lora_core::{DType, MatLayout, Result};

use super::weights::CudaLinear;
use crate::args::{Address, DeviceMat, KernelArgs, MatArg, assert_layout};
use crate::device::Cuda;
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;
use crate::ops::common::{MAX_THREADS, ROW_THREADS, VEC8, WARP, is_vec8};

#[repr(C)]
#[derive(Clone, Copy)]
struct QuantiseArgs {
    x: MatArg,
    codes: MatArg,
    scales: Address,
    /// The static scale; 0 where each row gets a scale by its largest value.
    scale: f32,
}

assert_layout!(QuantiseArgs is 80 bytes: x at 0, codes at 32, scales at 64, scale at 72);

// SAFETY: laid out as `QuantiseArgs` of `linear.cu`.
unsafe impl KernelArgs for QuantiseArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::QuantiseRows, Kernel::QuantiseRowsVec8];
}

/// The input of a GEMM as its kernel reads it.
#[derive(Clone, Copy)]
pub struct Input {
    /// The matrix, in e4m3 where the weights are.
    pub x: DeviceMat,
    /// Of codes in e4m3, the scale of each row.
    pub row_scales: Option<Address>,
}

impl Input {
    /// The scale of each row; null where there are none.
    pub fn row_scales_or_null(&self) -> Address {
        self.row_scales.unwrap_or(0)
    }
}

/// Alignment of the codes behind the scales.
const CODES_ALIGNMENT: usize = 256;

/// Vectors of eight elements that a thread of the vectorised kernel holds at most, as in `linear.cu`.
const MAX_VECTORS: usize = 4;

/// The input as the GEMM with `w` reads it. Codes lie in the queue's scratch memory.
pub fn input(cuda: &Cuda, q: &mut CudaQueue, x: DeviceMat, w: &CudaLinear) -> Result<Input> {
    let Some(fp8) = w.fp8() else { return Ok(Input { x, row_scales: None }) };
    let layout = x.layout();
    let (rows, cols) = (layout.rows, layout.cols);
    let for_scales = (rows * size_of::<f32>()).next_multiple_of(CODES_ALIGNMENT);
    let scales = q.scratch(for_scales + rows * cols)?;
    let codes = MatLayout::dense(rows, cols, DType::F8E4m3);
    let codes = DeviceMat::at(scales + for_scales as u64, codes);
    let scale = match fp8.input {
        InputScale::Static(scale) => scale,
        InputScale::Dynamic => 0.0,
    };
    let args = QuantiseArgs { x: x.into(), codes: codes.into(), scales, scale };
    let (kernel, launch) = choose(layout);
    cuda.launch(q, kernel, launch, args)?;
    Ok(Input { x: codes, row_scales: Some(scales) })
}

/// The kernel that keeps rows in registers where they are short enough, else the one for all.
fn choose(x: MatLayout) -> (Kernel, Launch) {
    let threads = x.cols.div_ceil(VEC8 * MAX_VECTORS).next_multiple_of(WARP).max(ROW_THREADS);
    if is_vec8(&[x]) && x.cols.is_multiple_of(VEC8) && threads <= MAX_THREADS {
        (Kernel::QuantiseRowsVec8, Launch::new([x.rows, 1, 1], threads))
    } else {
        (Kernel::QuantiseRows, Launch::new([x.rows, 1, 1], ROW_THREADS))
    }
}
