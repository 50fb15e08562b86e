//! Loading single tensors of a checkpoint into a backend's memory.

use lora_core::lora::{LoraSite, SiteSpec};
use lora_core::{Backend, DType, HostTensor, Pool, Result, Tensor};

use crate::model::shard::Shard;
use crate::model::{ModelConfig, ModelError, Norm, Quantization, WeightSource};

/// How to load a model.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    /// Dtype of the activations.
    pub dtype: DType,
    /// Longest sequence, in tokens: length of the rotary table.
    pub positions: usize,
    /// Adapter slots of each site.
    pub slots: usize,
    /// Which weights are in FP8, and whether the KV cache is.
    pub quantization: Quantization,
    /// This rank's shard of the model.
    pub shard: Shard,
}

/// Loads tensors of a checkpoint into a backend's memory.
pub(in crate::model) struct WeightLoader<'a, B: Backend> {
    pub be: &'a B,
    pub queue: &'a mut B::Queue,
    pub config: &'a ModelConfig,
    pub source: &'a mut dyn WeightSource,
    /// Dtype, quantisation, slots and shard.
    pub plan: &'a LoadPlan,
    /// Bytes of the matrices loaded so far.
    pub matrix_bytes: usize,
}

impl<B: Backend> WeightLoader<'_, B> {
    /// Loads the weight of a norm, in f32.
    pub fn norm(&mut self, name: &str, cols: usize) -> std::result::Result<Norm<B>, ModelError> {
        let values = self.source.take(name, &[cols])?.to_f32();
        let mut tensor = Tensor::zeros(self.be, Pool::Weights, 1, cols, DType::F32)?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.be.upload(self.queue, &bytes, tensor.view_mut())?;
        Ok(Norm::new(tensor, self.site(SiteSpec::norm(cols))?))
    }

    /// Reads a matrix. With 16-bit activations it is converted to their dtype if stored in another; with
    /// f32 activations it keeps its stored dtype.
    pub fn matrix(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> std::result::Result<HostTensor, ModelError> {
        let tensor = self.source.take(name, &[rows, cols])?;
        let dtype = self.plan.dtype;
        if dtype == DType::F32 || dtype == tensor.dtype() {
            return Ok(tensor);
        }
        let cast = tensor.cast(dtype).filter(HostTensor::is_finite);
        cast.ok_or_else(|| {
            let allowed = "values that are finite in that dtype; use bfloat16 or float32";
            let found = format!("{} that {} does not hold", tensor.dtype(), dtype);
            ModelError::unsupported(format!("tensor {name}"), found, allowed)
        })
    }

    /// Loads the matrix made of `parts`, stacked by rows, into the backend's layout.
    pub fn prepare(&mut self, parts: &[HostTensor], bias: Option<&[f32]>) -> Result<B::Linear> {
        self.matrix_bytes += parts.iter().map(|part| part.bytes().len()).sum::<usize>();
        self.be.prepare_linear(parts, bias)
    }

    /// A LoRA site with empty slots.
    pub fn site(&self, spec: SiteSpec) -> Result<LoraSite<B>> {
        Ok(LoraSite { table: self.be.lora_table(&spec, self.plan.slots)?, spec })
    }
}
