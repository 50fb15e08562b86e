//! The backend of NVIDIA GPUs will live here.
//!
//! There is no code yet: polylora runs on the CPU alone, by `lora-cpu-ref`.
#![warn(missing_docs)]
