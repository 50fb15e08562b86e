//! Models: reading checkpoints and their configurations, and the forward pass over any backend.

mod architecture;
mod attention;
mod checkpoint;
mod config;
mod decoder;
mod error;
mod family;
mod ffn;
mod layer;
mod norm;
mod pass;
mod projection;
mod rope;
mod shard;
mod sites;
pub mod state;

pub use architecture::{Architecture, AttentionBias, GgufRotary, Traits, WindowRule};
pub use attention::Attention;
pub use checkpoint::{
    DummySource, FolderSource, Fp8Weights, Gguf, GgufText, LoadPlan, ModulePatterns, Quantization,
    WeightSource, base_weights, dummy_weights, linear_names,
};
pub use config::{Biases, ModelConfig, parse_dtype};
pub use decoder::Decoder;
pub use error::ModelError;
pub use ffn::{DenseFfn, Ffn};
pub use layer::Layer;
pub use norm::Norm;
pub use projection::Projection;
pub use rope::{RopeConfig, RopeScaling};
pub use shard::{Part, Shard, Summand};
pub use sites::{LinearSite, Site, SliceKeys};
pub use state::{Extents, KvCache, LayerCache, RunState, StepRows, block_bytes};
