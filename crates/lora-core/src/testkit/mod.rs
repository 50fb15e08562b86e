//! Synthetic adapters, and a device that computes nothing: for tests and benchmarks.

mod make;
mod null;

pub use make::{Recipe, random_adapter, write_peft};
pub use null::{NullBackend, NullBuf, NullComm, NullLinear};
