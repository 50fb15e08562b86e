//! GEMMs with weight matrices.

pub mod any;
pub mod choice;
pub mod fused_args;
pub mod lt;
pub mod quantise;
pub mod row_norms;
pub mod stream;
pub mod stream_cut;
pub mod tiles;
pub mod weights;

use lora_core::{Result, check};

use self::choice::{Gemm, GemmShape};
use self::quantise::{Input, input};
use self::weights::CudaLinear;
use crate::args::DeviceMat;
use crate::device::{Cuda, View, ViewMut};
use crate::library::cublaslt::Beta;
use crate::memory::queue::CudaQueue;

/// See [`lora_core::Backend::linear`].
pub fn linear(
    cuda: &Cuda,
    q: &mut CudaQueue,
    x: View<'_>,
    w: &CudaLinear,
    out: &ViewMut<'_>,
) -> Result<()> {
    check::linear(x.layout, w.dims(), out.layout)?;
    if x.layout.rows == 0 {
        return Ok(());
    }
    let kernel = GemmShape { x: x.layout, w: w.shape(), out: out.layout }.choose();
    let input = input(cuda, q, x.into(), w)?;
    gemm(cuda, q, kernel, &input, w, out.into())
}

/// The product by the kernel that was chosen for it.
pub fn gemm(
    cuda: &Cuda,
    q: &mut CudaQueue,
    kernel: Gemm,
    input: &Input,
    w: &CudaLinear,
    out: DeviceMat,
) -> Result<()> {
    match kernel {
        Gemm::Stream => stream::gemm(cuda, q, input, w, None, out),
        Gemm::Lt if lt::gemm(cuda, q, input, w, Beta::Zero, out)? => Ok(()),
        Gemm::Lt | Gemm::Any => any::gemm(cuda, q, input, w, out),
    }
}
