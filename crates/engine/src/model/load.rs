//! Reading the parts of a decoder from a checkpoint.

use lora_core::lora::{LoraSite, SiteSpec};
use lora_core::{Backend, DType, HostTensor, Pool, Result, Split, TargetModule, Tensor};

use super::attention::Attention;
use super::decoder::{Layer, LoadPlan};
use super::ffn::{DenseFfn, Ffn};
use super::fp8::NamedPart;
use super::projection::Projection;
use super::{ModelConfig, ModelError, Norm, WeightSource};

/// What a projection is made of: its modules with their names and widths.
struct ProjectionSpec {
    modules: &'static [TargetModule],
    parts: &'static [&'static str],
    widths: Vec<usize>,
    in_dim: usize,
    bias: bool,
}

/// Turns a checkpoint's tensors into a backend's weights.
pub(super) struct Loader<'a, B: Backend> {
    pub be: &'a B,
    pub queue: &'a mut B::Queue,
    pub config: &'a ModelConfig,
    pub source: &'a mut dyn WeightSource,
    /// How the model is to be held; 16-bit weights of another dtype than the activations' are
    /// converted to that.
    pub plan: &'a LoadPlan,
    /// Bytes of the matrices so far.
    pub matrix_bytes: usize,
}

impl<B: Backend> Loader<'_, B> {
    /// Reads layer `i`.
    pub fn layer(&mut self, i: usize) -> std::result::Result<Layer<B>, ModelError> {
        let (base, hidden) = (format!("model.layers.{i}"), self.config.hidden);
        Ok(Layer {
            attention: self.attention(&base, i)?,
            ffn: self.ffn(&base)?,
            input_norm: self.norm(&format!("{base}.input_layernorm.weight"), hidden)?,
            post_norm: self.norm(&format!("{base}.post_attention_layernorm.weight"), hidden)?,
        })
    }

    /// Reads the attention of layer `i`.
    fn attention(&mut self, base: &str, i: usize) -> std::result::Result<Attention<B>, ModelError> {
        let c = self.config;
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let qkv = self.projection(
            base,
            &ProjectionSpec {
                modules: &[TargetModule::AttnQ, TargetModule::AttnK, TargetModule::AttnV],
                parts: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                widths: vec![q, kv, kv],
                in_dim: c.hidden,
                bias: c.biases.qkv,
            },
        )?;
        let o = self.projection(
            base,
            &ProjectionSpec {
                modules: &[TargetModule::AttnDense],
                parts: &["self_attn.o_proj"],
                widths: vec![c.hidden],
                in_dim: q,
                bias: c.biases.o,
            },
        )?;
        let qk_norms = match c.qk_norm {
            true => Some((
                self.norm(&format!("{base}.self_attn.q_norm.weight"), c.head_dim)?,
                self.norm(&format!("{base}.self_attn.k_norm.weight"), c.head_dim)?,
            )),
            false => None,
        };
        Ok(Attention {
            qkv,
            qk_norms,
            kv_scales: self.kv_scales(&format!("{base}.self_attn"))?,
            o,
            window: c.windows.get(i).copied().flatten(),
        })
    }

    /// Reads the feed-forward network of a layer.
    fn ffn(&mut self, base: &str) -> std::result::Result<Ffn<B>, ModelError> {
        let c = self.config;
        let gate_up = self.projection(
            base,
            &ProjectionSpec {
                modules: &[TargetModule::MlpHTo4h, TargetModule::MlpGate],
                parts: &["mlp.gate_proj", "mlp.up_proj"],
                widths: vec![c.intermediate; 2],
                in_dim: c.hidden,
                bias: c.biases.mlp,
            },
        )?;
        let down = self.projection(
            base,
            &ProjectionSpec {
                modules: &[TargetModule::Mlp4hToH],
                parts: &["mlp.down_proj"],
                widths: vec![c.hidden],
                in_dim: c.intermediate,
                bias: c.biases.mlp,
            },
        )?;
        Ok(Ffn::Dense(DenseFfn { gate_up, down }))
    }

    /// Reads a norm's weights as f32.
    pub fn norm(&mut self, name: &str, cols: usize) -> std::result::Result<Norm<B>, ModelError> {
        let values = self.source.take(name, &[cols])?.to_f32();
        let mut tensor = Tensor::zeros(self.be, Pool::Weights, 1, cols, DType::F32)?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.be.upload(self.queue, &bytes, tensor.view_mut())?;
        Ok(Norm::new(tensor, self.site(SiteSpec::norm(cols))?))
    }

    /// Reads a matrix in its stored dtype, or in the activations' 16-bit one if it has another.
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

    /// Hands the matrix made of `parts` to the backend.
    pub fn prepare(&mut self, parts: &[HostTensor], bias: Option<&[f32]>) -> Result<B::Linear> {
        self.matrix_bytes += parts.iter().map(|part| part.bytes().len()).sum::<usize>();
        self.be.prepare_linear(parts, bias)
    }

    /// A site's empty table.
    pub fn site(&self, spec: SiteSpec) -> Result<LoraSite<B>> {
        Ok(LoraSite { table: self.be.lora_table(&spec, self.plan.slots)?, spec })
    }

    /// Reads what this device holds of a projection.
    fn projection(
        &mut self,
        base: &str,
        spec: &ProjectionSpec,
    ) -> std::result::Result<Projection<B>, ModelError> {
        let mut parts = Vec::with_capacity(spec.parts.len());
        let mut bias = Vec::new();
        for ((name, rows), module) in spec.parts.iter().zip(&spec.widths).zip(spec.modules) {
            let name = format!("{base}.{name}");
            let part = self.plan.shard.part(self.config, *module);
            if spec.bias {
                let whole = self.source.take(&format!("{name}.bias"), &[*rows])?;
                bias.extend(part.of_bias(whole).iter().flat_map(HostTensor::iter_f32));
            }
            parts.push(NamedPart { name, rows: *rows, part });
        }
        let bias = (!bias.is_empty()).then_some(bias);
        let widths: Vec<usize> = parts.iter().map(|part| part.part.rows(part.rows)).collect();
        let in_dim = parts.first().map_or(spec.in_dim, |part| part.part.cols(spec.in_dim));
        Ok(Projection {
            weight: self.linear(&parts, spec.in_dim, bias.as_deref())?,
            bias,
            modules: spec.modules,
            parts: parts.into_iter().map(|part| part.part).collect(),
            split: spec.modules.first().map_or(Split::None, |module| module.split()),
            site: self.site(SiteSpec::linear(in_dim, &widths))?,
        })
    }
}
