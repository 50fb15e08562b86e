//! Weight matrices in device memory.

use lora_core::fp8::{Fp8Scales, InputScale};
use lora_core::{DType, HostTensor, MatLayout, Pool, Result, check};

use super::choice::{Bias, Weights};
use super::stream_cut;
use crate::args::{Address, DeviceMat};
use crate::device::Cuda;
use crate::memory::buffer::CudaBuf;
use crate::tensor_map::TensorMap;

/// A weight matrix `[out, in]` in device memory.
pub struct CudaLinear {
    weights: CudaBuf,
    layout: MatLayout,
    bias: Option<BiasBufs>,
    fp8: Option<Fp8>,
    /// How the stream kernel's TMA reads the weights, if that kernel takes them.
    stream_map: Option<TensorMap>,
}

/// A bias as the kernels of this crate read it, and as cuBLASLt does.
struct BiasBufs {
    f32: CudaBuf,
    /// The same numbers in bf16, where that loses nothing.
    bf16: Option<CudaBuf>,
}

/// Scales of weights in e4m3.
pub(crate) struct Fp8 {
    /// Of each output.
    of_outputs: CudaBuf,
    /// Of the input.
    pub(crate) input: InputScale,
}

impl CudaLinear {
    /// The weights, to compute with.
    pub(crate) fn mat(&self) -> DeviceMat {
        DeviceMat::new(&self.weights, self.layout)
    }

    /// Extents and dtype.
    pub(crate) fn layout(&self) -> MatLayout {
        self.layout
    }

    /// `[out, in]`.
    pub(crate) fn dims(&self) -> [usize; 2] {
        [self.layout.rows, self.layout.cols]
    }

    /// What the choice of a kernel depends on.
    pub(crate) fn shape(&self) -> Weights {
        let bias = match &self.bias {
            None => Bias::None,
            Some(BiasBufs { bf16: Some(_), .. }) => Bias::ExactInBf16,
            Some(_) => Bias::F32,
        };
        Weights { layout: self.layout, bias }
    }

    /// Scales, if the weights are in e4m3.
    pub(crate) fn fp8(&self) -> Option<&Fp8> {
        self.fp8.as_ref()
    }

    /// Scales of the outputs; null where there are none.
    pub(crate) fn w_scales(&self) -> Address {
        self.fp8.as_ref().map_or(0, |fp8| fp8.of_outputs.address())
    }

    /// The bias in f32; null where there is none.
    pub(crate) fn bias(&self) -> Address {
        self.bias.as_ref().map_or(0, |bias| bias.f32.address())
    }

    /// The bias in bf16, if there is one that loses nothing by that.
    pub(crate) fn bf16_bias(&self) -> Option<Address> {
        self.bias.as_ref()?.bf16.as_ref().map(CudaBuf::address)
    }

    /// How the stream kernel's TMA reads the weights, if that kernel takes them.
    pub(crate) fn stream_map(&self) -> Option<&TensorMap> {
        self.stream_map.as_ref()
    }
}

/// See [`lora_core::Backend::prepare_linear`].
pub fn prepare_linear(
    cuda: &Cuda,
    parts: &[HostTensor],
    bias: Option<&[f32]>,
) -> Result<CudaLinear> {
    let op = "prepare_linear";
    let dims = check::weight_parts(op, parts, bias, |d| check::float(op, "weight", d))?;
    upload_parts(cuda, parts, dims, bias)
}

/// See [`lora_core::Backend::prepare_fp8_linear`].
pub fn prepare_fp8_linear(
    cuda: &Cuda,
    parts: &[HostTensor],
    scales: &Fp8Scales,
    bias: Option<&[f32]>,
) -> Result<CudaLinear> {
    let dims = check::fp8_parts(parts, scales, bias)?;
    let mut linear = upload_parts(cuda, parts, dims, bias)?;
    let rows = parts.iter().map(|part| part.shape().first().copied().unwrap_or(0));
    let of_part = |(rows, scale): (usize, &f32)| vec![*scale; rows];
    let of_outputs: Vec<f32> = rows.zip(&scales.parts).flat_map(of_part).collect();
    let of_outputs = cuda.buffer_with(Pool::Weights, bytemuck::cast_slice(&of_outputs))?;
    linear.fp8 = Some(Fp8 { of_outputs, input: scales.input });
    Ok(linear)
}

fn upload_parts(
    cuda: &Cuda,
    parts: &[HostTensor],
    [n, k]: [usize; 2],
    bias: Option<&[f32]>,
) -> Result<CudaLinear> {
    let dtype = parts.first().map_or(DType::F32, HostTensor::dtype);
    let parts: Vec<&[u8]> = parts.iter().map(|part| &part.bytes()[..]).collect();
    let weights = CudaBuf::holding(&cuda.context, Pool::Weights, &parts)?;
    let layout = MatLayout::dense(n, k, dtype);
    let stream_map = stream_cut::weight_map(DeviceMat::new(&weights, layout))?;
    let bias = bias.map(|bias| upload_bias(cuda, bias)).transpose()?;
    Ok(CudaLinear { weights, layout, bias, fp8: None, stream_map })
}

fn upload_bias(cuda: &Cuda, bias: &[f32]) -> Result<BiasBufs> {
    let upload = |bytes: &[u8]| cuda.buffer_with(Pool::Weights, bytes);
    let bf16 = exactly_bf16(bias).map(|tensor| upload(tensor.bytes())).transpose()?;
    Ok(BiasBufs { f32: upload(bytemuck::cast_slice(bias))?, bf16 })
}

/// The same numbers in bf16, unless that changes any.
fn exactly_bf16(values: &[f32]) -> Option<HostTensor> {
    let tensor = HostTensor::from_f32(DType::Bf16, vec![values.len()], values)?;
    let same = tensor.iter_f32().zip(values).all(|(narrow, wide)| narrow == *wide);
    same.then_some(tensor)
}
