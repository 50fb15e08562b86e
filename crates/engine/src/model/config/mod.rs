//! The configuration of a dense decoder, and reading it from `config.json`.

use std::path::Path;

use lora_core::DType;
use lora_core::ops::HeadDims;
use serde::Deserialize;

use self::agree::agreed;
use self::rope_fields::{RawRope, RopeFields};
use super::architecture::{Architecture, AttentionBias, WindowRule};
use super::checkpoint::json_file::{parse_json, read_file, read_optional_file};
use super::rope::RopeConfig;
use super::{ModelError, family};
use crate::text::TokenIds;

mod agree;
mod rope_fields;

/// Which linear layers carry a bias.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Biases {
    /// q, k and v.
    pub qkv: bool,
    /// The output projection of attention.
    pub o: bool,
    /// gate, up and down.
    pub mlp: bool,
}

/// Shape and hyperparameters of a dense decoder.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelConfig {
    /// Model family.
    pub architecture: Architecture,
    /// Vocabulary size: rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Dimension of a head.
    pub head_dim: usize,
    /// Epsilon of all norms.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Longest sequence that the model was trained for.
    pub max_positions: usize,
    /// Whether `lm_head` is the embedding.
    pub tied_embeddings: bool,
    /// Which projections have biases.
    pub biases: Biases,
    /// Whether the heads of q and k have RMS norms.
    pub qk_norm: bool,
    /// Sliding window of each layer, if it has one.
    pub windows: Vec<Option<usize>>,
    /// Dtype that the checkpoint declares.
    pub dtype: DType,
    /// Tokens that end a sequence.
    pub eos_ids: Vec<u32>,
}

/// The fields of `config.json` that the engine reads.
#[derive(Deserialize)]
struct Raw {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f32,
    rope_theta: Option<f32>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    partial_rotary_factor: Option<f32>,
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    dtype: Option<String>,
    torch_dtype: Option<String>,
    eos_token_id: Option<TokenIds>,
}

/// Limit of `num_hidden_layers`, far above any model. Memory proportional to it is allocated before any
/// weight is read.
const MAX_LAYERS: usize = 1 << 16;

impl ModelConfig {
    /// Head dimensions of attention.
    pub const fn head_dims(&self) -> HeadDims {
        HeadDims { heads: self.heads, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }

    /// Reads `config.json` of a model folder, and the end tokens of its `generation_config.json`.
    ///
    /// # Errors
    /// [`ModelError`] naming the file, or the field with the value found and those allowed.
    pub fn from_dir(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let mut config = Self::from_json(&path, &read_file(&path)?)?;
        let generation = dir.join("generation_config.json");
        if let Some(text) = read_optional_file(&generation)? {
            #[derive(Deserialize)]
            struct Generation {
                eos_token_id: Option<TokenIds>,
            }
            if let Some(ids) = parse_json::<Generation>(&generation, &text)?.eos_token_id {
                config.eos_ids = ids.into_vec();
                config.check()?;
            }
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`. `path` names it in errors.
    ///
    /// # Errors
    /// As [`ModelConfig::from_dir`].
    pub fn from_json(path: &Path, text: &[u8]) -> Result<Self, ModelError> {
        family::check(path, text)?;
        Self::from_raw(parse_json(path, text)?)
    }

    fn from_raw(raw: Raw) -> Result<Self, ModelError> {
        let architecture = Architecture::from_name(&raw.model_type)?;
        let traits = architecture.traits();
        refuse_unsupported(&raw)?;
        if raw.num_hidden_layers > MAX_LAYERS {
            let (found, allowed) = (raw.num_hidden_layers, format!("at most {MAX_LAYERS}"));
            return Err(ModelError::unsupported("num_hidden_layers", found, allowed));
        }
        let heads = raw.num_attention_heads;
        let config = Self {
            architecture,
            vocab: raw.vocab_size,
            hidden: raw.hidden_size,
            intermediate: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads,
            kv_heads: raw.num_key_value_heads.unwrap_or(heads),
            head_dim: raw.head_dim.unwrap_or(raw.hidden_size / heads.max(1)),
            rms_norm_eps: raw.rms_norm_eps,
            rope: raw.rope()?,
            max_positions: raw.max_position_embeddings,
            tied_embeddings: raw.tie_word_embeddings,
            biases: raw.biases(traits.attention_bias),
            qk_norm: traits.qk_norm,
            windows: raw.windows(traits.window)?,
            dtype: raw.dtype()?,
            eos_ids: raw.eos_token_id.map_or_else(Vec::new, TokenIds::into_vec),
        };
        config.check()?;
        Ok(config)
    }

    /// Refuses shapes that no model can have, so that later arithmetic cannot overflow or divide by zero.
    pub(crate) fn check(&self) -> Result<(), ModelError> {
        for (field, value, limit) in [
            ("vocab_size", self.vocab, 1 << 24),
            ("hidden_size", self.hidden, 1 << 18),
            ("intermediate_size", self.intermediate, 1 << 20),
            ("num_hidden_layers", self.layers, 1 << 12),
            ("num_attention_heads", self.heads, 1 << 12),
            ("num_key_value_heads", self.kv_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 12),
            ("max_position_embeddings", self.max_positions, 1 << 24),
        ] {
            if value == 0 || value > limit {
                return Err(ModelError::unsupported(field, value, format!("1 to {limit}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let allowed = format!("a divisor of num_attention_heads ({})", self.heads);
            return Err(ModelError::unsupported("num_key_value_heads", self.kv_heads, allowed));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::unsupported("head_dim", self.head_dim, "an even number"));
        }
        if let Some(id) = self.eos_ids.iter().find(|id| **id as usize >= self.vocab) {
            let allowed = format!("token ids 0 to {}", self.vocab - 1);
            return Err(ModelError::unsupported("eos_token_id", id, allowed));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            let found = self.rms_norm_eps;
            return Err(ModelError::unsupported("rms_norm_eps", found, "a finite number >= 0"));
        }
        Ok(())
    }
}

/// Refuses settings that the forward pass does not implement.
fn refuse_unsupported(raw: &Raw) -> Result<(), ModelError> {
    if let Some(act) = raw.hidden_act.as_deref().filter(|act| *act != "silu") {
        return Err(ModelError::unsupported("hidden_act", act, "silu"));
    }
    Ok(())
}

impl Raw {
    fn rope(&self) -> Result<RopeConfig, ModelError> {
        let fields = RopeFields {
            rope_theta: self.rope_theta,
            partial_rotary_factor: self.partial_rotary_factor,
            rope_scaling: self.rope_scaling.as_ref(),
            rope_parameters: self.rope_parameters.as_ref(),
        };
        fields.read()
    }

    /// The checkpoint's dtype; bfloat16 if it declares none.
    fn dtype(&self) -> Result<DType, ModelError> {
        let parse = |field, name: &Option<String>| {
            name.as_deref().map(|name| parse_dtype(field, name)).transpose()
        };
        let dtype = parse("dtype", &self.dtype)?;
        let torch_dtype = parse("torch_dtype", &self.torch_dtype)?;
        let agreed = agreed([("dtype", dtype), ("torch_dtype", torch_dtype)])?;
        Ok(agreed.unwrap_or(DType::Bf16))
    }

    const fn biases(&self, rule: AttentionBias) -> Biases {
        let (qkv, o) = match rule {
            AttentionBias::AsConfigured => (self.attention_bias, self.attention_bias),
            AttentionBias::QueryKeyValue => (true, false),
        };
        Biases { qkv, o, mlp: self.mlp_bias }
    }

    fn windows(&self, rule: WindowRule) -> Result<Vec<Option<usize>>, ModelError> {
        let enabled = match rule {
            WindowRule::EveryLayer => true,
            WindowRule::Never => false,
            WindowRule::SomeLayers => self.use_sliding_window.unwrap_or(false),
        };
        let Some(window) = self.sliding_window.filter(|_| enabled) else {
            return Ok(vec![None; self.num_hidden_layers]);
        };
        if window == 0 {
            return Err(ModelError::unsupported("sliding_window", 0, "at least 1, or null"));
        }
        if rule == WindowRule::EveryLayer {
            return Ok(vec![Some(window); self.num_hidden_layers]);
        }
        if let Some(types) = &self.layer_types {
            if types.len() != self.num_hidden_layers {
                let allowed = format!("num_hidden_layers ({})", self.num_hidden_layers);
                return Err(ModelError::unsupported("layer_types.len()", types.len(), allowed));
            }
            return types.iter().map(|kind| layer_window(kind, window)).collect();
        }
        let first = self.max_window_layers.unwrap_or(self.num_hidden_layers);
        Ok((0..self.num_hidden_layers).map(|i| (i >= first).then_some(window)).collect())
    }
}

fn layer_window(kind: &str, window: usize) -> Result<Option<usize>, ModelError> {
    match kind {
        "full_attention" => Ok(None),
        "sliding_attention" => Ok(Some(window)),
        _ => {
            let allowed = "full_attention or sliding_attention";
            Err(ModelError::unsupported("layer_types", kind, allowed))
        }
    }
}

/// Parses the name of a dtype, such as `bfloat16`.
///
/// # Errors
/// [`ModelError::Unsupported`] naming `field`.
pub fn parse_dtype(field: &'static str, name: &str) -> Result<DType, ModelError> {
    match name.trim_start_matches("torch.") {
        "float32" => Ok(DType::F32),
        "float16" | "half" => Ok(DType::F16),
        "bfloat16" => Ok(DType::Bf16),
        _ => Err(ModelError::unsupported(field, name, "float32, float16 or bfloat16")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn parse(change: impl Fn(&mut Value)) -> Result<ModelConfig, ModelError> {
        let mut json = serde_json::json!({
            "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "hidden_act": "silu",
            "sliding_window": 16,
        });
        change(&mut json);
        ModelConfig::from_raw(serde_json::from_value(json).unwrap())
    }

    #[test]
    fn the_family_decides_the_sliding_window() {
        assert_eq!(parse(|_| ()).unwrap().windows, [None; 3]);
        let mistral = parse(|j| j["model_type"] = "mistral".into()).unwrap();
        assert_eq!(mistral.windows, [Some(16); 3]);
        let qwen = parse(|j| {
            j["model_type"] = "qwen2".into();
            j["use_sliding_window"] = true.into();
            j["max_window_layers"] = 2.into();
        });
        assert_eq!(qwen.unwrap().windows, [None, None, Some(16)]);
    }

    #[test]
    fn both_spellings_of_rope_scaling_are_read() {
        let rope = serde_json::json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 5e5,
        });
        let new = parse(|j| j["rope_parameters"] = rope.clone()).unwrap().rope;
        let old = parse(|j| j["rope_scaling"] = rope.clone()).unwrap().rope;
        assert_eq!(new, old);
        assert_eq!(new.theta, 5e5);
    }

    #[test]
    fn two_names_of_a_setting_may_agree() {
        let linear = serde_json::json!({"rope_type": "linear", "type": "linear", "factor": 2.0});
        let config = parse(|j| {
            j["dtype"] = "float16".into();
            j["torch_dtype"] = "torch.float16".into();
            j["rope_theta"] = 5e5.into();
            j["rope_scaling"] = linear.clone();
            j["rope_parameters"] = linear.clone();
            j["rope_parameters"]["rope_theta"] = 5e5.into();
        });
        let config = config.unwrap();
        assert_eq!(config.dtype, DType::F16);
        assert_eq!(config.rope.theta, 5e5);
        assert_eq!(
            config.rope,
            parse(|j| {
                j["rope_theta"] = 5e5.into();
                j["rope_scaling"] = linear.clone();
            })
            .unwrap()
            .rope
        );
        // An empty object counts as absent.
        let empty = parse(|j| {
            j["rope_scaling"] = serde_json::json!({});
            j["rope_parameters"] = linear.clone();
        });
        assert_eq!(
            empty.unwrap().rope,
            parse(|j| j["rope_scaling"] = linear.clone()).unwrap().rope
        );
    }

    #[test]
    fn two_names_that_disagree_are_both_named() {
        let (linear, default) = (
            serde_json::json!({"rope_type": "linear", "factor": 2.0}),
            serde_json::json!({"rope_type": "default", "rope_theta": 10000.0}),
        );
        let both = serde_json::json!({"rope_type": "linear", "type": "default", "factor": 2.0});
        for (fields, words) in [
            (
                vec![("dtype", Value::from("float16")), ("torch_dtype", "bfloat16".into())],
                ["dtype is float16", "torch_dtype is bfloat16"],
            ),
            (
                vec![("rope_scaling", linear.clone()), ("rope_parameters", default.clone())],
                [
                    "rope_scaling is {\"rope_type\":\"linear\",\"factor\":2.0}",
                    "rope_parameters is {",
                ],
            ),
            (
                vec![("rope_theta", 5e5.into()), ("rope_parameters", default.clone())],
                ["rope_parameters.rope_theta is 10000", "rope_theta is 500000"],
            ),
            (
                vec![
                    ("rope_scaling", serde_json::json!({"rope_theta": 5e5})),
                    ("rope_parameters", default),
                ],
                ["rope_scaling.rope_theta is 500000", "rope_parameters.rope_theta is 10000"],
            ),
            (vec![("rope_scaling", both)], ["rope_type is linear", "type is default"]),
        ] {
            let error = parse(|j| {
                for (field, value) in &fields {
                    j[*field] = value.clone();
                }
            });
            let error = error.unwrap_err().to_string();
            for word in words {
                assert!(error.contains(word), "{word} is not in: {error}");
            }
        }
    }

    #[test]
    fn unsupported_settings_are_refused_by_name() {
        for (field, value) in [
            ("model_type", Value::from("gemma")),
            ("num_hidden_layers", Value::from(1u64 << 40)),
            ("hidden_act", "gelu".into()),
            ("partial_rotary_factor", 0.5.into()),
            ("num_key_value_heads", 3.into()),
            ("hidden_size", 0.into()),
            ("rope_scaling", serde_json::json!({"type": "yarn"})),
            ("rope_parameters", serde_json::json!({"partial_rotary_factor": 0.5})),
            ("dtype", "int8".into()),
            ("torch_dtype", "int8".into()),
        ] {
            let error = parse(|j| j[field] = value.clone()).unwrap_err().to_string();
            let named = field.trim_end_matches("_scaling").trim_end_matches("_parameters");
            assert!(error.contains(named), "{field}: {error}");
        }
    }
}
