//! The ops, one file a concept: checks, then launches.

pub mod attention;
pub mod linear;
pub mod logprobs;
pub mod lora;
pub mod norm;
pub mod rope;
pub mod rows;
pub mod sample;

use lora_core::{DType, MatLayout};

use crate::device::is_aligned;

/// Threads of a block that works on one row.
const ROW_THREADS: usize = 256;

/// Threads of a block, at most.
const MAX_THREADS: usize = 1024;

/// Threads of a warp.
const WARP: usize = 32;

/// Elements that kernels load and store together, where operands are as [`in_eights`] says.
const EIGHT: usize = 8;

/// Whether operands are of one 16-bit dtype, with rows at multiples of 16 bytes.
fn in_eights(operands: &[MatLayout]) -> bool {
    let dtype = operands.first().map(|layout| layout.dtype);
    let narrow = matches!(dtype, Some(DType::Bf16 | DType::F16));
    narrow && operands.iter().all(|layout| Some(layout.dtype) == dtype && is_aligned(*layout))
}
