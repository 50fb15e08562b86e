//! Synthetic adapters, for tests and benchmarks.

mod make;

pub use make::{Recipe, random_adapter, write_peft};
