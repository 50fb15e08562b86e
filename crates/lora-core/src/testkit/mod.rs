//! Synthetic adapters, and a backend that computes nothing, for tests and benchmarks.

mod make;
mod memory;
mod null;

pub use make::{Recipe, random_adapter, write_peft};
pub use memory::{CountedBlock, CountedMemory};
pub use null::{NullBackend, NullBuf, NullLinear, NullLoraPlan, NullLoraTable};
