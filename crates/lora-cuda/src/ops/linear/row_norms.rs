//! Norms of rows of adapted weights, by which DoRA divides.
#![allow(unsafe_code)]

use std::ops::Range;

use lora_core::ops::HostUpdate;
use lora_core::{DType, HostTensor, MatLayout, Pool, Result, check};

use super::weights::CudaLinear;
use crate::args::{Address, DeviceMat, KernelArgs, MatArg, assert_layout};
use crate::device::Cuda;
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::buffer::CudaBuf;
use crate::memory::queue::CudaQueue;
use crate::ops::common::{ROW_THREADS, WARP};

#[repr(C)]
#[derive(Clone, Copy)]
struct RowNormArgs {
    w: MatArg,
    a: MatArg,
    b: MatArg,
    w_scales: Address,
    norms: Address,
    from: i64,
    scale: f32,
}

assert_layout!(RowNormArgs is 128 bytes: w at 0, w_scales at 96, from at 112, scale at 120);

// SAFETY: laid out as `RowNormArgs` of `linear.cu`.
unsafe impl KernelArgs for RowNormArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::RowNorms];
}

/// See [`lora_core::Backend::row_norms`].
pub fn row_norms(
    cuda: &Cuda,
    w: &CudaLinear,
    rows: &Range<usize>,
    HostUpdate { a, b, scale }: HostUpdate<'_>,
) -> Result<Vec<f32>> {
    let rank = check::row_norms(w.dims(), rows, a, b)?;
    let upload = |tensor: &HostTensor| {
        cuda.buffer_with(Pool::Activations, bytemuck::cast_slice(&tensor.to_f32()))
    };
    let (a, b) = (upload(a)?, upload(b)?);
    let f32s = |rows, cols| MatLayout::dense(rows, cols, DType::F32);
    let norms = CudaBuf::zeroed(&cuda.context, Pool::Activations, size_of::<f32>() * rows.len())?;
    let mut q = CudaQueue::new(&cuda.context)?;
    let args = RowNormArgs {
        w: w.mat().into(),
        a: DeviceMat::new(&a, f32s(rank, w.layout().cols)).into(),
        b: DeviceMat::new(&b, f32s(rows.len(), rank)).into(),
        w_scales: w.w_scales(),
        norms: norms.address(),
        from: rows.start as i64,
        scale,
    };
    let blocks = rows.len().div_ceil(ROW_THREADS / WARP);
    let launch = Launch::new([blocks, 1, 1], ROW_THREADS);
    cuda.launch(&q, Kernel::RowNorms, launch, args)?;
    let norms = q.download(DeviceMat::new(&norms, f32s(1, rows.len())))?.wait()?;
    Ok(bytemuck::pod_collect_to_vec(&norms))
}
