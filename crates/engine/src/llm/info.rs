//! Facts about a running engine.

use lora_core::{DType, ModelGeometry, QuantAlgo};

use super::startup::MemoryPlan;
use crate::model::ModelConfig;

/// Facts about a running engine.
#[derive(Clone, Debug)]
pub struct EngineInfo {
    /// Shape and constants of the model.
    pub model: ModelConfig,
    /// The same, as adapters see it.
    pub geometry: ModelGeometry,
    /// Dtype of the activations.
    pub dtype: DType,
    /// Algorithm of the base weights; `None`: they are in 16 or 32 bits.
    pub quant_algo: Option<QuantAlgo>,
    /// Dtype of keys and values.
    pub kv_dtype: DType,
    /// Name of the backend.
    pub backend: &'static str,
    /// Longest prompt and answer together, in tokens.
    pub max_seq_len: usize,
    /// Sequences that run at a time.
    pub max_batch_size: usize,
    /// Tokens that fit the KV cache.
    pub kv_tokens: usize,
    /// What the device's memory is used for.
    pub memory: MemoryPlan,
}
