//! Settings of an engine, under TensorRT-LLM's names.

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
    /// Random numbers of the config's shape, for benchmarks.
    Dummy,
}

/// Element type of keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheDtype {
    /// The checkpoint's; that of the activations where it names none.
    #[default]
    Auto,
    /// e4m3, with the checkpoint's scales or 1.
    Fp8,
}

/// Memory for keys and values. Unknown fields are refused.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvCacheConfig {
    /// Element type.
    pub dtype: KvCacheDtype,
    /// Tokens of one KV block.
    pub tokens_per_block: usize,
    /// Tokens that fit the cache, at most.
    pub max_tokens: Option<usize>,
    /// Share of the memory that the model, activations and adapters leave free, above 0 and below 1.
    /// `None`: 0.9 where the device has memory of its own, and 2 GiB where it is the host's, or
    /// half of what is free there if that is less. Neither
    /// takes more than `max_batch_size` of the longest sequences need, nor more than `max_tokens`.
    pub free_gpu_memory_fraction: Option<f64>,
    /// Whether sequences of one adapter share the KV blocks of equal prefixes.
    pub enable_block_reuse: bool,
    /// Whether the beginning of a block is reused.
    pub enable_partial_reuse: bool,
    /// Whether a block that is reused in part is copied first. Must be true: a block is never
    /// written while another sequence may read it.
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

/// How sequences are scheduled. Unknown fields are refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SchedulerConfig {
    /// When a waiting sequence may start.
    pub capacity_scheduler_policy: CapacityPolicy,
}

/// Which steps are recorded as CUDA graphs: those in which every sequence decodes, of some sizes.
/// Unknown fields are refused.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CudaGraphConfig {
    /// Numbers of sequences that steps are recorded for; `None`: a few up to `max_batch_size`.
    pub batch_sizes: Option<Vec<usize>>,
    /// Steps of more sequences are not recorded; `None`: of more than 256.
    pub max_batch_size: Option<usize>,
    /// Whether a step of another size is padded to the next one that is recorded. TensorRT-LLM's
    /// default is `false`, which leaves most sizes without a graph.
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
    /// Their name. LoRA inside the experts needs CUTLASS, which AUTO means.
    pub backend: MoeBackendName,
}

/// The tokens of a step and of a sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::llm) struct BatchLimits {
    /// Sequences that run at a time.
    pub max_batch_size: usize,
    /// Rows of one step.
    pub max_num_tokens: usize,
    /// Prompt and answer together; the model's own limit where `None`.
    pub max_seq_len: Option<usize>,
}
