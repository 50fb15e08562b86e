//! Groups of settings, under TensorRT-LLM's names.

use loramux_moe::MoeBackendName;
use serde::{Deserialize, Serialize};

use crate::scheduler::CapacityPolicy;

/// Where weights come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadFormat {
    /// The checkpoint.
    #[default]
    Auto,
    /// Random weights of the configured shape, for benchmarks.
    Dummy,
}

/// Element type of keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheDtype {
    /// The checkpoint's; the dtype of the activations if it specifies none.
    #[default]
    Auto,
    /// e4m3, with the checkpoint's scales, or 1 if it has none.
    Fp8,
}

/// Size and reuse of the KV cache. Unknown fields are refused.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvCacheConfig {
    /// Element type.
    pub dtype: KvCacheDtype,
    /// Tokens per KV block.
    pub tokens_per_block: usize,
    /// Most tokens of the cache.
    pub max_tokens: Option<usize>,
    /// Share of the memory that the model, activations and adapters leave free, above 0 and below 1.
    /// `None`: 0.9 on a device with memory of its own; on the host 2 GiB, or half of the free memory if that
    /// is less. Never more than `max_batch_size` sequences of the maximum length need, nor more than
    /// `max_tokens`.
    pub free_gpu_memory_fraction: Option<f64>,
    /// Whether sequences with the same adapter and equal prefixes share KV blocks.
    pub enable_block_reuse: bool,
    /// Whether the first tokens of a block are reused if the whole block does not match.
    pub enable_partial_reuse: bool,
    /// Whether a partly reused block is copied first. Must be true, as a block is never written while
    /// another sequence may read it.
    pub copy_on_partial_reuse: bool,
}

impl Default for KvCacheConfig {
    fn default() -> Self {
        Self {
            dtype: KvCacheDtype::Auto,
            tokens_per_block: 32,
            max_tokens: None,
            free_gpu_memory_fraction: None,
            enable_block_reuse: true,
            enable_partial_reuse: true,
            copy_on_partial_reuse: true,
        }
    }
}

/// Scheduling of sequences. Unknown fields are refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SchedulerConfig {
    /// When a waiting sequence is admitted.
    pub capacity_scheduler_policy: CapacityPolicy,
}

/// Which pure decode steps are recorded as CUDA graphs. Unknown fields are refused.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CudaGraphConfig {
    /// Batch sizes to record; `None`: some sizes up to `max_batch_size`.
    pub batch_sizes: Option<Vec<usize>>,
    /// Largest batch size to record; `None`: 256.
    pub max_batch_size: Option<usize>,
    /// Whether a step of another size is padded to the next recorded size. TensorRT-LLM's default is `false`,
    /// which leaves most sizes without a graph.
    pub enable_padding: bool,
}

impl Default for CudaGraphConfig {
    fn default() -> Self {
        Self { batch_sizes: None, max_batch_size: None, enable_padding: true }
    }
}

/// Kernels of routed experts. Unknown fields are refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MoeConfig {
    /// Name of the kernels. LoRA in experts needs CUTLASS, which AUTO selects.
    pub backend: MoeBackendName,
}

/// Limits of a step and of a sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::llm) struct BatchLimits {
    /// Most running sequences.
    pub max_batch_size: usize,
    /// Most tokens of one step.
    pub max_num_tokens: usize,
    /// Maximum length of prompt and generated tokens together; `None`: the model's limit.
    pub max_seq_len: Option<usize>,
}
