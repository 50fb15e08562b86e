//! The ops, one file a concept: checks, then launches.

pub mod attention;
pub mod linear;
pub mod logprobs;
pub mod lora;
pub mod lora_table;
pub mod norm;
pub mod rope;
pub mod rows;
pub mod sample;

/// Threads of a block that works on one row.
const ROW_THREADS: usize = 256;

/// Threads of a warp.
const WARP: usize = 32;
