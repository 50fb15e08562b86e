//! The [`Backend`](lora_core::Backend) trait on NVIDIA GPUs of compute capability 9.0.
//!
//! The crate compiles on any machine. The driver, cuBLASLt and the kernels, which
//! `cargo xtask kernels` compiles, are looked up when a [`Cuda`] is made; whatever is missing is a
//! [`CudaError`] that says what to do.
#![warn(missing_docs)]

mod args;
mod backend;
mod buffer;
mod copies;
mod device;
mod download;
mod error;
mod flashinfer;
mod graph;
pub mod kernels;
mod lt;
mod modules;
mod ops;
mod queue;

pub use buffer::CudaBuf;
pub use device::Cuda;
pub use download::CudaDownload;
pub use error::CudaError;
pub use graph::CudaGraph;
pub use ops::attention_plan::AttentionPlan;
pub use ops::linear::CudaLinear;
pub use ops::lora_table::CudaLoraTable;
pub use queue::CudaQueue;

type View<'a> = lora_core::View<'a, Cuda>;
type ViewMut<'a> = lora_core::ViewMut<'a, Cuda>;
