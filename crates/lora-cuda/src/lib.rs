//! The [`Backend`](https://docs.rs/lora-core) on NVIDIA GPUs will live here.
//!
//! There is no code yet: this build runs on the CPU alone, by `lora-cpu-ref`.
#![warn(missing_docs)]
