//! The parts of a decoder layer, and how they are read from a checkpoint.

use lora_core::lora::{LoraBatch, LoraSite, SiteSpec};
use lora_core::ops::KvScales;
use lora_core::{
    Backend, Comm, DType, HostTensor, Pool, Result, Split, TargetModule, Tensor, View, ViewMut,
};

use super::dense::LoadPlan;
use super::fp8::NamedPart;
use super::shard::Part;
use super::{ModelConfig, ModelError, Norm, WeightSource};

/// A base projection and its adapters: one site, a slice per module.
pub struct Projection<B: Backend> {
    /// Base weight, the modules' rows stacked, with its bias.
    pub weight: B::Linear,
    /// Base bias on the host, for adapters that replace or scale it.
    pub bias: Option<Vec<f32>>,
    /// Modules of the slices, in order.
    pub modules: &'static [TargetModule],
    /// What this device holds of each module.
    pub parts: Vec<Part>,
    /// How the modules are divided among the devices of a group.
    split: Split,
    /// Adapters; the table has no slots when the engine serves none.
    pub site: LoraSite<B>,
}

impl<B: Backend> Projection<B> {
    /// The base layer plus each row's adapter, summed over the ranks where each has some of the input
    /// features. `lora` is `None` when no row has one.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn forward(
        &self,
        (be, comm): (&B, &B::Comm),
        q: &mut B::Queue,
        x: View<'_, B>,
        lora: Option<&LoraBatch<B>>,
        mut out: ViewMut<'_, B>,
    ) -> Result<()> {
        let lora = lora.map(|batch| (&self.site, batch));
        be.linear_lora(q, x, &self.weight, lora, out.reborrow())?;
        match self.split {
            Split::Row => comm.all_reduce_sum(be, q, out),
            Split::Column | Split::None => Ok(()),
        }
    }

    /// As [`Projection::forward`], to `gate_up`, of which `out` gets the gated half.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn forward_gated(
        &self,
        be: &B,
        q: &mut B::Queue,
        x: View<'_, B>,
        lora: Option<&LoraBatch<B>>,
        gate_up: ViewMut<'_, B>,
        out: ViewMut<'_, B>,
    ) -> Result<()> {
        let lora = lora.map(|batch| (&self.site, batch));
        be.gated_linear_lora(q, x, &self.weight, lora, gate_up, out)
    }
}

/// One decoder layer.
pub struct Layer<B: Backend> {
    /// Norm before attention, of `hidden` columns.
    pub input_norm: Norm<B>,
    /// q, k and v.
    pub qkv: Projection<B>,
    /// Norms of q and k heads, of `head_dim` columns each.
    pub qk_norms: Option<(Norm<B>, Norm<B>)>,
    /// Scales of keys and values in the cache.
    pub kv_scales: KvScales,
    /// Output projection of attention.
    pub o: Projection<B>,
    /// Norm before the MLP, of `hidden` columns.
    pub post_norm: Norm<B>,
    /// gate and up.
    pub gate_up: Projection<B>,
    /// down.
    pub down: Projection<B>,
    /// Sliding window in tokens.
    pub window: Option<usize>,
}

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
        let c = self.config;
        let base = format!("model.layers.{i}");
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let qkv = self.projection(
            &base,
            &ProjectionSpec {
                modules: &[TargetModule::AttnQ, TargetModule::AttnK, TargetModule::AttnV],
                parts: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                widths: vec![q, kv, kv],
                in_dim: c.hidden,
                bias: c.biases.qkv,
            },
        )?;
        let o = self.projection(
            &base,
            &ProjectionSpec {
                modules: &[TargetModule::AttnDense],
                parts: &["self_attn.o_proj"],
                widths: vec![c.hidden],
                in_dim: q,
                bias: c.biases.o,
            },
        )?;
        let gate_up = self.projection(
            &base,
            &ProjectionSpec {
                modules: &[TargetModule::MlpHTo4h, TargetModule::MlpGate],
                parts: &["mlp.gate_proj", "mlp.up_proj"],
                widths: vec![c.intermediate; 2],
                in_dim: c.hidden,
                bias: c.biases.mlp,
            },
        )?;
        let down = self.projection(
            &base,
            &ProjectionSpec {
                modules: &[TargetModule::Mlp4hToH],
                parts: &["mlp.down_proj"],
                widths: vec![c.hidden],
                in_dim: c.intermediate,
                bias: c.biases.mlp,
            },
        )?;
        let qk_norms = match c.qk_norm {
            true => Some((
                self.norm(&format!("{base}.self_attn.q_norm.weight"), c.head_dim)?,
                self.norm(&format!("{base}.self_attn.k_norm.weight"), c.head_dim)?,
            )),
            false => None,
        };
        Ok(Layer {
            input_norm: self.norm(&format!("{base}.input_layernorm.weight"), c.hidden)?,
            post_norm: self.norm(&format!("{base}.post_attention_layernorm.weight"), c.hidden)?,
            kv_scales: self.kv_scales(&format!("{base}.self_attn"))?,
            window: c.windows.get(i).copied().flatten(),
            qkv,
            qk_norms,
            o,
            gate_up,
            down,
        })
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
