//! Models: what a checkpoint holds, and the forward pass over any backend.

mod base;
mod config;
mod dense;
mod error;
mod family;
mod fp8;
mod gguf;
mod layers;
mod norm;
mod quant_method;
mod quantization;
mod rope;
mod shard;
mod source;
pub mod state;

pub use base::{base_weights, dummy_weights};
pub(crate) use config::TokenIds;
pub use config::{Architecture, Biases, ModelConfig, parse_dtype};
pub use dense::{DenseModel, LoadPlan};
pub use error::ModelError;
pub use gguf::{Gguf, GgufText};
pub use layers::{Layer, Projection};
pub use norm::Norm;
pub use quantization::{Fp8Weights, ModulePatterns, Quantization};
pub use rope::{RopeConfig, RopeScaling};
pub use shard::{Part, Shard, Summand};
pub use source::{DummySource, FolderSource, WeightSource};
pub use state::{Extents, KvCache, RunState, StepRows, block_bytes};
