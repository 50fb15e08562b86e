//! The [`lora_core::Backend`] of a machine without a GPU, and the oracle that other backends are
//! tested against.
//!
//! Ops are plain loops in the order of their formula, one file a concept under `ops/`. The inner
//! products alone are fast as well: [`inner`] has an obvious and a fast implementation, tested
//! against each other. Everything is deterministic, and a row's result does not depend on the
//! other rows of its batch, in any dtype.
#![warn(missing_docs)]

mod backend;
mod buffer;
mod comm;
pub mod inner;
mod memory;
mod ops;
mod philox;
mod rows;

pub use backend::CpuRef;
pub use buffer::CpuBuf;
pub use comm::ThreadComm;
pub use ops::linear::CpuLinear;
pub use ops::lora::CpuLoraTable;

/// Name of the backend in messages.
const NAME: &str = "cpu";

type View<'a> = lora_core::View<'a, CpuRef>;
type ViewMut<'a> = lora_core::ViewMut<'a, CpuRef>;
