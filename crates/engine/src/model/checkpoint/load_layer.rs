//! Loading the layers of a decoder from a checkpoint.

use lora_core::lora::SiteSpec;
use lora_core::{Backend, HostTensor, Split, TargetModule};

use super::loader::WeightLoader;
use crate::model::ModelError;
use crate::model::attention::Attention;
use crate::model::ffn::{DenseFfn, Ffn};
use crate::model::layer::Layer;
use crate::model::projection::Projection;
use crate::model::shard::NamedPart;

const QKV: [&str; 3] = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
const O: [&str; 1] = ["self_attn.o_proj"];
const GATE_UP: [&str; 2] = ["mlp.gate_proj", "mlp.up_proj"];
const DOWN: [&str; 1] = ["mlp.down_proj"];

/// Names of the linear layers of a dense model in a checkpoint, with that of `lm_head`.
pub fn linear_names(layers: usize) -> Vec<String> {
    let parts = || QKV.into_iter().chain(O).chain(GATE_UP).chain(DOWN);
    let of_layer = |i| parts().map(move |part| format!("model.layers.{i}.{part}"));
    (0..layers).flat_map(of_layer).chain(["lm_head".to_owned()]).collect()
}

/// The modules that a projection stacks, with their names in the checkpoint and their output widths.
struct ProjectionSpec {
    modules: &'static [TargetModule],
    parts: &'static [&'static str],
    widths: Vec<usize>,
    in_dim: usize,
    bias: bool,
}

impl<B: Backend> WeightLoader<'_, B> {
    /// Loads layer `i`.
    pub fn layer(&mut self, i: usize) -> Result<Layer<B>, ModelError> {
        let (base, hidden) = (format!("model.layers.{i}"), self.config.hidden);
        Ok(Layer {
            attention: self.attention(&base, i)?,
            ffn: self.ffn(&base)?,
            input_norm: self.norm(&format!("{base}.input_layernorm.weight"), hidden)?,
            post_norm: self.norm(&format!("{base}.post_attention_layernorm.weight"), hidden)?,
        })
    }

    /// Loads the attention of layer `i`.
    fn attention(&mut self, base: &str, i: usize) -> Result<Attention<B>, ModelError> {
        let c = self.config;
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let qkv = self.projection(
            base,
            &ProjectionSpec {
                modules: &[TargetModule::AttnQ, TargetModule::AttnK, TargetModule::AttnV],
                parts: &QKV,
                widths: vec![q, kv, kv],
                in_dim: c.hidden,
                bias: c.biases.qkv,
            },
        )?;
        let o = self.projection(
            base,
            &ProjectionSpec {
                modules: &[TargetModule::AttnDense],
                parts: &O,
                widths: vec![c.hidden],
                in_dim: q,
                bias: c.biases.o,
            },
        )?;
        let qk_norms = if c.qk_norm {
            Some((
                self.norm(&format!("{base}.self_attn.q_norm.weight"), c.head_dim)?,
                self.norm(&format!("{base}.self_attn.k_norm.weight"), c.head_dim)?,
            ))
        } else {
            None
        };
        Ok(Attention {
            qkv,
            qk_norms,
            kv_scales: self.kv_scales(&format!("{base}.self_attn"))?,
            o,
            window: c.windows.get(i).copied().flatten(),
        })
    }

    /// Loads the feed-forward network of a layer.
    fn ffn(&mut self, base: &str) -> Result<Ffn<B>, ModelError> {
        let c = self.config;
        let gate_up = self.projection(
            base,
            &ProjectionSpec {
                modules: &[TargetModule::MlpHTo4h, TargetModule::MlpGate],
                parts: &GATE_UP,
                widths: vec![c.intermediate; 2],
                in_dim: c.hidden,
                bias: c.biases.mlp,
            },
        )?;
        let down = self.projection(
            base,
            &ProjectionSpec {
                modules: &[TargetModule::Mlp4hToH],
                parts: &DOWN,
                widths: vec![c.hidden],
                in_dim: c.intermediate,
                bias: c.biases.mlp,
            },
        )?;
        Ok(Ffn::Dense(DenseFfn { gate_up, down }))
    }

    /// Loads this rank's part of a projection.
    fn projection(
        &mut self,
        base: &str,
        spec: &ProjectionSpec,
    ) -> Result<Projection<B>, ModelError> {
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
