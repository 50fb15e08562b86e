//! Configuration and sizes of a running engine.

use lora_core::{DType, ModelGeometry, QuantAlgo};

use super::startup::MemoryPlan;
use crate::model::ModelConfig;

/// Configuration and sizes of a running engine.
#[derive(Clone, Debug)]
pub struct EngineInfo {
    /// Configuration of the model.
    pub model: ModelConfig,
    /// Dimensions of the model that adapters have to match.
    pub geometry: ModelGeometry,
    /// Dtype of the activations.
    pub dtype: DType,
    /// Quantisation of the base weights; `None`: 16 or 32 bits.
    pub quant_algo: Option<QuantAlgo>,
    /// Dtype of keys and values.
    pub kv_dtype: DType,
    /// Name of the backend.
    pub backend: &'static str,
    /// Maximum length of prompt and generated tokens together.
    pub max_seq_len: usize,
    /// Most running sequences.
    pub max_batch_size: usize,
    /// Tokens that fit the KV cache.
    pub kv_tokens: usize,
    /// How the device's memory is divided.
    pub memory: MemoryPlan,
}
