//! GEMMs by cuBLASLt.

use lora_core::{DType, Result};

use super::quantise::Input;
use super::weights::CudaLinear;
use crate::args::DeviceMat;
use crate::device::Cuda;
use crate::library::cublaslt::{Beta, Extras, Operands, Scales};
use crate::memory::queue::CudaQueue;

/// `out = x wᵀ + bias`, plus what `out` holds before where `beta` is one, for operands that
/// [`GemmShape::suits_lt`] says suit. `false` where cuBLASLt has no algorithm for them.
///
/// [`GemmShape::suits_lt`]: super::choice::GemmShape::suits_lt
pub fn gemm(
    cuda: &Cuda,
    q: &mut CudaQueue,
    input: &Input,
    w: &CudaLinear,
    beta: Beta,
    out: DeviceMat,
) -> Result<bool> {
    let bias = w.bf16_bias().filter(|_| out.layout().dtype == DType::Bf16);
    let scales = input.row_scales.map(|of_rows| Scales { of_outputs: w.w_scales(), of_rows });
    let operands = Operands { x: input.x, w: w.mat(), out };
    cuda.lt.borrow_mut().gemm(q, operands, Extras { scales, bias, beta })
}
