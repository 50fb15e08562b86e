//! Sizes of launches, and what the operands of vectorised kernels have in common.

use lora_core::{DType, MatLayout};

/// Threads of a block that works on one row.
pub const ROW_THREADS: usize = 256;

/// Threads of a block, at most.
pub const MAX_THREADS: usize = 1024;

/// Threads of a warp.
pub const WARP: usize = 32;

/// Elements that a vectorised kernel loads and stores at a time.
pub const VEC8: usize = 8;

/// Whether every row of a matrix begins at a multiple of 16 bytes; buffers themselves do.
pub fn is_aligned(layout: MatLayout) -> bool {
    let size = layout.dtype.size();
    (layout.offset * size).is_multiple_of(16) && (layout.row_stride * size).is_multiple_of(16)
}

/// Whether vectorised kernels take these operands: one 16-bit dtype, and rows at multiples of 16 bytes.
pub fn is_vec8(operands: &[MatLayout]) -> bool {
    let dtype = operands.first().map(|layout| layout.dtype);
    let narrow = matches!(dtype, Some(DType::Bf16 | DType::F16));
    narrow && operands.iter().all(|layout| Some(layout.dtype) == dtype && is_aligned(*layout))
}
