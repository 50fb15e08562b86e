//! Checkpoints: their files, formats and quantisation, and the model that is loaded from them.

mod base;
mod fp8;
mod gguf;
pub(super) mod json_file;
mod load_layer;
pub(super) mod loader;
mod quant_method;
mod quantization;
mod source;

pub use base::{base_weights, dummy_weights};
pub use gguf::{Gguf, GgufText};
pub use load_layer::linear_names;
pub use loader::LoadPlan;
pub use quantization::{Fp8Weights, ModulePatterns, Quantization};
pub use source::{DummySource, FolderSource, WeightSource};
