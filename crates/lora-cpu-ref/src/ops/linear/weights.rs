//! Packed weight matrices.

use lora_core::fp8::{Fp8Scales, InputScale};
use lora_core::{DType, Error, HostTensor, Result, check};

use crate::inner::{Dtype, InnerError, Packed, Part};

/// A weight matrix `[out, in]`, packed for the inner product.
pub struct CpuLinear {
    pub(crate) packed: Packed,
    pub(crate) bias: Option<Vec<f32>>,
    /// Scales of e4m3 weights, which are packed as bf16; that represents all e4m3 values.
    pub(crate) fp8: Option<Fp8>,
}

/// See [`lora_core::Backend::prepare_linear`].
pub fn prepare(parts: &[HostTensor], bias: Option<&[f32]>) -> Result<CpuLinear> {
    let packed = pack("prepare_linear", parts, bias)?;
    Ok(CpuLinear { packed, bias: bias.map(<[f32]>::to_vec), fp8: None })
}

/// See [`lora_core::Backend::prepare_fp8_linear`].
pub fn prepare_fp8(
    parts: &[HostTensor],
    scales: &Fp8Scales,
    bias: Option<&[f32]>,
) -> Result<CpuLinear> {
    check::fp8_parts(parts, scales, bias)?;
    let widened: Vec<HostTensor> = parts.iter().filter_map(|part| part.cast(DType::Bf16)).collect();
    let mut linear = prepare(&widened, bias)?;
    let ends = parts.iter().scan(0, |end, part| {
        *end += part.shape().first().copied().unwrap_or(0);
        Some(*end)
    });
    let parts = ends.zip(scales.parts.iter().copied()).collect();
    linear.fp8 = Some(Fp8 { parts, input: scales.input });
    Ok(linear)
}

/// Packs matrices stacked by rows, with a bias over all rows or none.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] if they are not matrices, or differ in columns or dtype.
pub fn pack(op: &'static str, tensors: &[HostTensor], bias: Option<&[f32]>) -> Result<Packed> {
    let float = |dtype| check::float(op, "weight", dtype);
    let [_, k] = check::weight_parts(op, tensors, bias, float)?;
    let mut parts = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let dtype = packed_dtype(op, tensor.dtype())?;
        parts.push(Part { dtype, rows: tensor.shape()[0], bytes: tensor.bytes() });
    }
    Packed::pack(&parts, k).map_err(|e| misfit(op, &e))
}

fn packed_dtype(op: &'static str, dtype: DType) -> Result<Dtype> {
    match dtype {
        DType::Bf16 => Ok(Dtype::Bf16),
        DType::F16 => Ok(Dtype::F16),
        DType::F32 => Ok(Dtype::F32),
        found => check::float(op, "weight", found).map(|()| Dtype::F32),
    }
}

/// Converts an error of the inner product, which repeats the checks of the ops.
pub fn misfit(op: &'static str, error: &InnerError) -> Error {
    Error::Unsupported { op, backend: crate::NAME, what: error.to_string() }
}

/// Scales of a [`CpuLinear`] with e4m3 weights.
pub struct Fp8 {
    /// End of each part's outputs, and the scale of the part.
    pub(super) parts: Vec<(usize, f32)>,
    pub(super) input: InputScale,
}

impl Fp8 {
    /// The scale of output `n`.
    pub fn of_output(&self, n: usize) -> f32 {
        self.parts.iter().find(|(end, _)| n < *end).map_or(1.0, |(_, scale)| *scale)
    }
}
