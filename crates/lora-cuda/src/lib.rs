//! The [`Backend`](lora_core::Backend) trait on NVIDIA GPUs of compute capability 9.0.
//!
//! The crate compiles on any machine. The driver, cuBLASLt and the kernels, which
//! `cargo xtask kernels` compiles, are looked up when a [`Cuda`] is made; whatever is missing is a
//! [`CudaError`] that says what to do.
#![warn(missing_docs)]

mod args;
mod backend;
mod device;
mod error;
mod graph;
mod launch;
mod library;
mod memory;
mod ops;
mod tensor_map;

pub use device::Cuda;
pub use error::CudaError;
pub use graph::CudaGraph;
pub use library::kernels;
pub use memory::buffer::CudaBuf;
pub use memory::download::CudaDownload;
pub use memory::queue::CudaQueue;
pub use ops::attention::plan::AttentionPlan;
pub use ops::linear::weights::CudaLinear;
pub use ops::lora::plan::{CudaLoraKey, CudaLoraPlan};
pub use ops::lora::table::CudaLoraTable;
