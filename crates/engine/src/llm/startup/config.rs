//! All settings of an engine, under TensorRT-LLM's names.

use std::path::PathBuf;

use lora_core::{DType, LoraConfig, PeftCacheConfig, QuantConfig, Rejection};
use loramux_moe::MoeBackendName;
use serde::{Deserialize, Serialize};

use super::settings::{
    BatchLimits, CudaGraphConfig, KvCacheConfig, LoadFormat, MoeConfig, SchedulerConfig,
};
use crate::llm::LlmError;

/// All settings of an engine, as set by a YAML file, command line flags or the methods of
/// [`crate::LlmBuilder`]. Missing fields have defaults; unknown fields are refused.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineConfig {
    /// Folder of a tokenizer and chat template that replace the model's own.
    pub tokenizer: Option<PathBuf>,
    /// Dtype of the activations; `None` (`auto` in a file): the checkpoint's. With `float32`, the exact mode,
    /// weights keep their stored 16-bit dtype.
    #[serde(with = "dtype_or_auto")]
    pub dtype: Option<DType>,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Most running sequences.
    pub max_batch_size: usize,
    /// Most tokens of one step; longer prompts are prefilled in chunks.
    pub max_num_tokens: usize,
    /// Maximum length of prompt and generated tokens together; `None`: the model's limit.
    pub max_seq_len: Option<usize>,
    /// Number of devices among which every layer is split.
    pub tensor_parallel_size: usize,
    /// Settings of LoRA; `None`: requests cannot have adapters.
    pub lora_config: Option<LoraConfig>,
    /// Sizes of the adapter tiers, and number of loader threads. `max_loras` and `max_cpu_loras` of
    /// `lora_config` take precedence over the sizes.
    pub peft_cache_config: PeftCacheConfig,
    /// Quantisation of base weights and KV cache: FP8 or none. It must agree with a quantised checkpoint; a
    /// 16-bit checkpoint is quantised on loading. Adapters are not quantised.
    pub quant_config: Option<QuantConfig>,
    /// Size and reuse of the KV cache.
    pub kv_cache_config: KvCacheConfig,
    /// Admission of waiting sequences.
    pub scheduler_config: SchedulerConfig,
    /// CUDA graphs of pure decode steps, if the device supports them; `None` (`null` in a file): no graphs.
    pub cuda_graph_config: Option<CudaGraphConfig>,
    /// Whether every step waits for the tokens of the previous one. With overlap scheduling, pure decode steps
    /// are launched one ahead, with the same results. `None`: overlap if the device computes
    /// asynchronously.
    pub disable_overlap_scheduler: Option<bool>,
    /// Kernels of routed experts.
    pub moe_config: MoeConfig,
    /// Alternative to `backend` of `moe_config`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moe_backend: Option<MoeBackendName>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            tokenizer: None,
            dtype: None,
            load_format: LoadFormat::Auto,
            max_batch_size: 256,
            max_num_tokens: 1024,
            max_seq_len: None,
            tensor_parallel_size: 1,
            lora_config: None,
            peft_cache_config: PeftCacheConfig::default(),
            quant_config: None,
            kv_cache_config: KvCacheConfig::default(),
            scheduler_config: SchedulerConfig::default(),
            cuda_graph_config: Some(CudaGraphConfig::default()),
            disable_overlap_scheduler: None,
            moe_config: MoeConfig::default(),
            moe_backend: None,
        }
    }
}

/// An error in a configuration file.
#[derive(Debug, thiserror::Error)]
#[error("{problem}")]
pub struct ConfigError {
    /// The field with its position in the file, and what is wrong with it.
    pub problem: String,
}

/// Most YAML nodes of a configuration file. Bounds the memory that a malicious file can take, by aliases for
/// example.
const MAX_NODES: usize = 10_000;

impl EngineConfig {
    /// Parses a YAML file, in the form that TensorRT-LLM's `--config` takes. An empty file has all defaults.
    ///
    /// # Errors
    /// [`ConfigError`] with line and column, for invalid YAML, an unknown field or a value of another type.
    pub fn from_yaml(text: &str) -> Result<Self, ConfigError> {
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! { max_nodes: MAX_NODES },
            alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: MAX_NODES },
            with_snippet: false,
        };
        let mut field = None;
        let read = serde_saphyr::with_deserializer_from_str_with_options(text, options, |yaml| {
            let read: Result<Option<Self>, _> = serde_path_to_error::deserialize(yaml);
            read.map_err(|error| {
                field = Some(error.path().to_string()).filter(|path| path != ".");
                error.into_inner()
            })
        });
        match (read, field) {
            (Ok(config), _) => Ok(config.unwrap_or_default()),
            (Err(error), Some(field)) => Err(ConfigError { problem: format!("{field}: {error}") }),
            (Err(error), None) => Err(ConfigError { problem: error.to_string() }),
        }
    }

    /// Kernels of routed experts, from `moe_backend` or `moe_config`.
    ///
    /// # Errors
    /// [`LlmError::Setting`] if both are set and differ.
    pub(super) fn resolved_moe_backend(&self) -> Result<MoeBackendName, LlmError> {
        let inner = self.moe_config.backend;
        match self.moe_backend {
            Some(outer) if inner != MoeBackendName::Auto && inner != outer => {
                let allowed =
                    format!("{}, as in moe_config, or leave one of them out", inner.name());
                Err(LlmError::setting("moe_backend", outer.name(), allowed))
            }
            outer => Ok(outer.unwrap_or(inner)),
        }
    }

    /// All rules that the settings break, independently of the model.
    pub(super) fn validate(&self) -> Vec<Rejection> {
        let mut problems = self.lora_config.as_ref().map_or_else(Vec::new, LoraConfig::validate);
        problems.extend(self.peft_cache_config.validate());
        problems.extend(self.quant_config.iter().flat_map(QuantConfig::validate));
        problems
    }

    /// Limits of a step and of a sequence.
    pub(super) fn batch(&self) -> BatchLimits {
        BatchLimits {
            max_batch_size: self.max_batch_size,
            max_num_tokens: self.max_num_tokens,
            max_seq_len: self.max_seq_len,
        }
    }
}

/// Serialises a dtype by the names that TensorRT-LLM uses.
mod dtype_or_auto {
    use lora_core::DType;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub fn serialize<S: Serializer>(dtype: &Option<DType>, to: S) -> Result<S::Ok, S::Error> {
        dtype.map_or_else(|| "auto".to_owned(), |dtype| dtype.to_string()).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<DType>, D::Error> {
        let name = Option::<String>::deserialize(from)?;
        match name.as_deref() {
            None | Some("auto") => Ok(None),
            Some("bfloat16" | "bf16") => Ok(Some(DType::Bf16)),
            Some("float16" | "fp16" | "half") => Ok(Some(DType::F16)),
            Some("float32" | "fp32" | "float") => Ok(Some(DType::F32)),
            Some(found) => Err(D::Error::custom(format!(
                "dtype is {found:?}; allowed: auto, bfloat16, float16, float32"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files of TensorRT-LLM's documentation on LoRA, with common additions.
    #[test]
    fn a_file_may_set_any_setting() {
        let config = EngineConfig::from_yaml(
            "lora_config:\n  lora_dir:\n    - /loras/0\n  max_lora_rank: 64\n  max_loras: 8\n  \
             max_cpu_loras: 8\n  lora_target_modules:\n    - attn_q\n    - attn_k\n  \
             trtllm_modules_to_hf_modules:\n    attn_q: q_proj\n    attn_k: k_proj\n\
             peft_cache_config: {host_cache_size: 1000000}\ncuda_graph_config: null\n\
             moe_config: {backend: CUTLASS}\ndtype: float16\nkv_cache_config:\n  dtype: fp8\n",
        )
        .unwrap();
        let lora = config.lora_config.as_ref().unwrap();
        assert_eq!((lora.max_lora_rank, lora.max_loras), (64, Some(8)));
        assert_eq!(lora.lora_target_modules, ["attn_q", "attn_k"]);
        assert_eq!(config.peft_cache_config.host_cache_size, 1_000_000);
        assert_eq!((config.cuda_graph_config.as_ref(), config.dtype), (None, Some(DType::F16)));
        assert_eq!(config.resolved_moe_backend().unwrap(), MoeBackendName::Cutlass);
        for empty in ["", "# nothing\n", "{}"] {
            assert_eq!(EngineConfig::from_yaml(empty).unwrap(), EngineConfig::default(), "{empty}");
        }
    }

    #[test]
    fn unknown_and_invalid_settings_are_refused_with_their_position() {
        for (text, parts) in [
            ("max_batch_size: 4\nmax_lora: 3\n", ["max_lora", "line 2"]),
            ("lora_config:\n  max_rank: 8\n", ["lora_config.max_rank", "line 2"]),
            ("lora_config:\n  max_loras: -1\n", ["lora_config.max_loras", "line 2"]),
            ("max_batch_size: many\n", ["max_batch_size: ", "line 1"]),
            ("max_batch_size: 1\nmax_batch_size: 2\n", ["max_batch_size", "line 2"]),
            ("dtype: int4\n", ["dtype is \"int4\"", "bfloat16"]),
            ("- a\n", ["map", "line 1"]),
            ("a: &a [*a]\n", ["a", ""]),
            ("{", ["", ""]),
        ] {
            let error = EngineConfig::from_yaml(text).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{text}: {error}");
        }
        let both = EngineConfig::from_yaml("moe_backend: TRITON\nmoe_config: {backend: CUTLASS}\n");
        assert!(
            both.unwrap()
                .resolved_moe_backend()
                .unwrap_err()
                .to_string()
                .contains("moe_backend is TRITON")
        );
    }

    #[test]
    fn a_configuration_survives_serialisation() {
        let config = EngineConfig {
            dtype: Some(DType::F32),
            lora_config: Some(LoraConfig::default()),
            moe_backend: Some(MoeBackendName::Vanilla),
            ..EngineConfig::default()
        };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(EngineConfig::from_yaml(&text).unwrap(), config);
    }
}
