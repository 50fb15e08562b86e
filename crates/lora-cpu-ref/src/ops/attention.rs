//! Causal attention over paged keys and values, a row and a head at a time.

use std::ops::Range;

use bytemuck::Pod;
use half::bf16;
use lora_core::ops::AttentionArgs;
use lora_core::{DType, Error, Result, check_extent};

use crate::inner::{Isa, axpy_rows, dot_rows, exp};
use crate::rows::{
    check_cache, check_float, checked_index, for_pieces, indices, read_row, typed_row,
};
use crate::{CpuRef, View, ViewMut};

const OP: &str = "attention";

/// Multiplications of a row's attention below which heads stay on the calling thread.
const SERIAL_PRODUCTS: usize = 64 * 1024;

/// See [`lora_core::Backend::attention`].
pub fn attention(isa: Isa, args: &AttentionArgs<'_, CpuRef>, mut out: ViewMut<'_>) -> Result<()> {
    let (positions, sequences) = check(args, &out)?;
    let dims = args.dims;
    let longest = positions.iter().map(|p| *p as usize + 1).max().unwrap_or(1);
    let least = SERIAL_PRODUCTS.div_ceil((2 * longest * dims.head_dim).max(1));
    let group = dims.heads / dims.kv_heads;
    let scale = args.scale * args.kv_scales.k;
    for_pieces::<Scratch>(isa, &mut out, dims.head_dim, least, |row, head, mut piece, scratch| {
        let position = positions[row] as usize;
        let first = args.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let table = typed_row::<i32>(&args.block_tables, sequences[row] as usize);
        let columns = head / group * dims.head_dim..(head / group + 1) * dims.head_dim;
        let runs = || runs(first..position + 1, table, args.tokens_per_block);

        let query = head * dims.head_dim..(head + 1) * dims.head_dim;
        read_row(isa, &args.queries.slice_cols(query), row, &mut scratch.query);
        scratch.query.iter_mut().for_each(|q| *q *= scale);
        let keys = args.k_cache.slice_cols(columns.clone());
        scratch.scores.resize(position + 1 - first, 0.0);
        let mut scores = &mut scratch.scores[..];
        for run in runs() {
            let (head, tail) = scores.split_at_mut(run.len());
            key_products(isa, &scratch.query, &keys.slice_rows(run), head);
            scores = tail;
        }
        let total = exponentials(isa, &mut scratch.scores);
        let values = args.v_cache.slice_cols(columns);
        scratch.sum.clear();
        scratch.sum.resize(dims.head_dim, 0.0);
        let mut weights = &scratch.scores[..];
        for run in runs() {
            let (head, tail) = weights.split_at(run.len());
            add_values(isa, &mut scratch.sum, head, &values.slice_rows(run));
            weights = tail;
        }
        scratch.sum.iter_mut().for_each(|v| *v = *v / total * args.kv_scales.v);
        piece.store(&scratch.sum);
    });
    Ok(())
}

/// The rows of the caches that hold the given positions: a range for each KV block.
fn runs(
    positions: Range<usize>,
    table: &[i32],
    tokens_per_block: usize,
) -> impl Iterator<Item = Range<usize>> {
    let blocks = positions.start / tokens_per_block..positions.end.div_ceil(tokens_per_block);
    blocks.map(move |block| {
        let (from, to) = (block * tokens_per_block, (block + 1) * tokens_per_block);
        let base = table[block] as usize * tokens_per_block;
        let inside = positions.start.max(from) - from..positions.end.min(to) - from;
        base + inside.start..base + inside.end
    })
}

/// What a thread keeps from head to head.
#[derive(Default)]
struct Scratch {
    query: Vec<f32>,
    scores: Vec<f32>,
    sum: Vec<f32>,
}

/// Checks everything that indexes something, so that the loops cannot go astray.
fn check<'a>(
    args: &AttentionArgs<'a, CpuRef>,
    out: &ViewMut<'_>,
) -> Result<(&'a [i32], &'a [i32])> {
    let (dims, rows) = (args.dims, args.queries.geo.rows);
    check_float(OP, "queries", args.queries.geo.dtype)?;
    check_cache(OP, "k_cache", args.k_cache.geo.dtype)?;
    check_float(OP, "out", out.geo.dtype)?;
    let left_over = dims.heads.checked_rem(dims.kv_heads).unwrap_or(dims.heads.max(1));
    check_extent(OP, "heads that kv_heads do not divide", left_over, 0)?;
    if args.window == Some(0) {
        return Err(Error::Shape { op: OP, what: "window", found: 0, expected: 1 });
    }
    check_extent(OP, "columns of queries", args.queries.geo.cols, dims.q_cols())?;
    check_extent(OP, "rows of out", out.geo.rows, rows)?;
    check_extent(OP, "columns of out", out.geo.cols, dims.q_cols())?;
    check_extent(OP, "row stride of out", out.geo.row_stride, dims.q_cols())?;
    check_extent(OP, "columns of k_cache", args.k_cache.geo.cols, dims.kv_cols())?;
    check_extent(OP, "columns of v_cache", args.v_cache.geo.cols, dims.kv_cols())?;
    check_extent(OP, "rows of v_cache", args.v_cache.geo.rows, args.k_cache.geo.rows)?;
    if args.v_cache.geo.dtype != args.k_cache.geo.dtype {
        let (found, allowed) = (args.v_cache.geo.dtype, "the dtype of k_cache");
        return Err(Error::DType { op: OP, what: "v_cache", found, allowed });
    }
    if args.block_tables.geo.dtype != DType::I32 {
        let (found, allowed) = (args.block_tables.geo.dtype, "int32");
        return Err(Error::DType { op: OP, what: "block_tables", found, allowed });
    }
    let positions = indices(OP, "positions", &args.positions)?;
    let sequences = indices(OP, "sequence_of_row", &args.sequence_of_row)?;
    check_extent(OP, "positions", positions.len(), rows)?;
    check_extent(OP, "sequence_of_row", sequences.len(), rows)?;
    let tables = args.block_tables.geo;
    let blocks = args.k_cache.geo.rows / args.tokens_per_block.max(1);
    for (position, sequence) in positions.iter().zip(sequences) {
        let covered = tables.cols * args.tokens_per_block;
        let position = checked_index(OP, "position", *position, covered)?;
        let sequence = checked_index(OP, "sequence", *sequence, tables.rows)?;
        let used = position / args.tokens_per_block;
        for block in &typed_row::<i32>(&args.block_tables, sequence)[..=used] {
            checked_index(OP, "KV block", *block, blocks)?;
        }
    }
    Ok((positions, sequences))
}

/// Replaces scores by `exp(score - largest)` and returns their sum.
fn exponentials(isa: Isa, scores: &mut [f32]) -> f32 {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|score| *score -= largest);
    exp(isa, scores);
    scores.iter().sum()
}

/// `scores[i] = query · keys[i]`.
fn key_products(isa: Isa, query: &[f32], keys: &View<'_>, scores: &mut [f32]) {
    let stride = keys.geo.row_stride;
    match keys.geo.dtype {
        DType::Bf16 => dot_rows(isa, query, from_first::<bf16>(keys), stride, scores),
        DType::F16 | DType::F8E4m3 => {
            let (keys, stride) = widen_all(isa, keys);
            dot_rows(isa, query, &keys, stride, scores);
        }
        _ => dot_rows(isa, query, from_first::<f32>(keys), stride, scores),
    }
}

/// `sum += weights[i] * values[i]` for all `i`.
fn add_values(isa: Isa, sum: &mut [f32], weights: &[f32], values: &View<'_>) {
    let stride = values.geo.row_stride;
    match values.geo.dtype {
        DType::Bf16 => axpy_rows(isa, sum, weights, from_first::<bf16>(values), stride),
        DType::F16 | DType::F8E4m3 => {
            let (values, stride) = widen_all(isa, values);
            axpy_rows(isa, sum, weights, &values, stride);
        }
        _ => axpy_rows(isa, sum, weights, from_first::<f32>(values), stride),
    }
}

/// The buffer from a view's first element to its last.
fn from_first<'a, T: Pod>(view: &View<'a>) -> &'a [T] {
    let start = view.geo.offset;
    &view.buf.as_slice::<T>()[start..start + view.geo.span()]
}

/// All rows in f32, with their stride.
fn widen_all(isa: Isa, view: &View<'_>) -> (Vec<f32>, usize) {
    let (mut all, mut row) = (Vec::with_capacity(view.geo.rows * view.geo.cols), Vec::new());
    for r in 0..view.geo.rows {
        read_row(isa, view, r, &mut row);
        all.extend_from_slice(&row);
    }
    (all, view.geo.cols)
}
