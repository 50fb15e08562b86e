//! Checks of attention and its KV cache.

use super::{dtype, float, id_row, ids, index, norm::norm_weights};
use crate::device::ops::{AttentionArgs, QkvArgs};
use crate::device::{Backend, DType, Error, MatLayout, Result, check_extent};

/// Checks that an operand can be a KV cache.
///
/// # Errors
/// [`crate::Error::DType`].
fn cache(op: &'static str, what: &'static str, found: DType) -> Result<()> {
    if found == DType::F8E4m3 {
        return Ok(());
    }
    float(op, what, found)
}

/// Checks [`crate::Backend::qk_norm_rope_append`].
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`].
pub fn qkv<B: Backend>(args: &QkvArgs<'_, B>) -> Result<()> {
    const OP: &str = "qk_norm_rope_append";
    let (dims, rows) = (args.dims, args.qkv.layout.rows);
    float(OP, "qkv", args.qkv.layout.dtype)?;
    check_extent(OP, "columns of qkv", args.qkv.layout.cols, dims.q_cols() + 2 * dims.kv_cols())?;
    for held in [&args.k_cache, &args.v_cache] {
        cache(OP, "cache", held.layout.dtype)?;
        check_extent(OP, "columns of a cache", held.layout.cols, dims.kv_cols())?;
    }
    check_extent(OP, "rows of v_cache", args.v_cache.layout.rows, args.k_cache.layout.rows)?;
    check_extent(OP, "positions", id_row(OP, "positions", args.positions.layout)?, rows)?;
    check_extent(OP, "kv_slots", id_row(OP, "kv_slots", args.kv_slots.layout)?, rows)?;
    check_extent(OP, "head_dim modulo 2", dims.head_dim % 2, 0)?;
    dtype(OP, "cos_sin_table", args.cos_sin_table.layout.dtype, DType::F32)?;
    check_extent(OP, "columns of cos_sin_table", args.cos_sin_table.layout.cols, dims.head_dim)?;
    match &args.norms {
        Some((q, k, _)) => {
            norm_weights(OP, q, [rows, dims.head_dim])?;
            norm_weights(OP, k, [rows, dims.head_dim])
        }
        None => Ok(()),
    }
}

/// Checks positions and slots of [`crate::Backend::qk_norm_rope_append`].
///
/// # Errors
/// [`crate::Error::OutOfRange`].
pub fn qkv_ids<B: Backend>(args: &QkvArgs<'_, B>, positions: &[i32], slots: &[i32]) -> Result<()> {
    const OP: &str = "qk_norm_rope_append";
    ids(OP, "position", positions, args.cos_sin_table.layout.rows)?;
    let mut stored = slots.iter().filter(|slot| **slot != -1);
    stored.try_for_each(|s| index(OP, "KV slot", *s, args.k_cache.layout.rows).map(drop))
}

/// Checks [`crate::Backend::attention`].
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`].
pub fn attention<B: Backend>(args: &AttentionArgs<'_, B>, out: MatLayout) -> Result<()> {
    const OP: &str = "attention";
    let (dims, rows) = (args.dims, args.queries.layout.rows);
    float(OP, "queries", args.queries.layout.dtype)?;
    cache(OP, "k_cache", args.k_cache.layout.dtype)?;
    float(OP, "out", out.dtype)?;
    if dims.kv_heads == 0 || !dims.heads.is_multiple_of(dims.kv_heads) {
        let (found, divisor) = (dims.heads, dims.kv_heads);
        return Err(Error::Indivisible { op: OP, what: "heads", found, by: "kv_heads", divisor });
    }
    for (what, given) in [("window", args.window), ("block", Some(args.tokens_per_block))] {
        if given == Some(0) {
            return Err(Error::Shape { op: OP, what, found: 0, expected: 1 });
        }
    }
    check_extent(OP, "columns of queries", args.queries.layout.cols, dims.q_cols())?;
    check_extent(OP, "rows of out", out.rows, rows)?;
    check_extent(OP, "columns of out", out.cols, dims.q_cols())?;
    check_extent(OP, "row stride of out", out.row_stride, dims.q_cols())?;
    check_extent(OP, "columns of k_cache", args.k_cache.layout.cols, dims.kv_cols())?;
    check_extent(OP, "columns of v_cache", args.v_cache.layout.cols, dims.kv_cols())?;
    check_extent(OP, "rows of v_cache", args.v_cache.layout.rows, args.k_cache.layout.rows)?;
    if args.v_cache.layout.dtype != args.k_cache.layout.dtype {
        let (found, allowed) = (args.v_cache.layout.dtype, "the dtype of k_cache");
        return Err(Error::DType { op: OP, what: "v_cache", found, allowed });
    }
    dtype(OP, "block_tables", args.block_tables.layout.dtype, DType::I32)?;
    check_extent(OP, "positions", id_row(OP, "positions", args.positions.layout)?, rows)?;
    let sequences = id_row(OP, "sequence_of_row", args.sequence_of_row.layout)?;
    check_extent(OP, "sequence_of_row", sequences, rows)
}

/// Checks positions, sequences and the KV blocks that [`crate::Backend::attention`] reads; `table` gives the blocks
/// of a sequence.
///
/// # Errors
/// [`crate::Error::OutOfRange`].
pub fn attention_ids<'t, B: Backend>(
    args: &AttentionArgs<'_, B>,
    positions: &[i32],
    sequences: &[i32],
    table: impl Fn(usize) -> &'t [i32],
) -> Result<()> {
    const OP: &str = "attention";
    let tables = args.block_tables.layout;
    let blocks = args.k_cache.layout.rows / args.tokens_per_block;
    for (position, sequence) in positions.iter().zip(sequences) {
        let covered = tables.cols * args.tokens_per_block;
        let position = index(OP, "position", *position, covered)?;
        let sequence = index(OP, "sequence", *sequence, tables.rows)?;
        ids(OP, "KV block", &table(sequence)[..=position / args.tokens_per_block], blocks)?;
    }
    Ok(())
}
