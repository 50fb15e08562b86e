//! Synthetic adapters, for tests and benchmarks.

mod make;

pub use make::{Recipe, write_peft};
