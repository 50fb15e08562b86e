//! Causal attention over paged keys and values, a row and a head at a time.

use std::ops::Range;

use bytemuck::Pod;
use half::bf16;
use lora_core::ops::AttentionArgs;
use lora_core::{DType, Result, check};

use crate::inner::{Isa, axpy_rows, dot_rows, exp};
use crate::rows::{for_pieces, read_row, typed_row};
use crate::{CpuRef, View, ViewMut};

/// Rows that need fewer multiplications are computed on the calling thread.
const SERIAL_PRODUCTS: usize = 64 * 1024;

/// See [`lora_core::Backend::attention`].
pub fn attention(isa: Isa, args: &AttentionArgs<'_, CpuRef>, mut out: ViewMut<'_>) -> Result<()> {
    check::attention(args, out.layout)?;
    let positions = typed_row::<i32>(&args.positions, 0);
    let sequences = typed_row::<i32>(&args.sequence_of_row, 0);
    let table = |sequence| typed_row::<i32>(&args.block_tables, sequence);
    check::attention_ids(args, positions, sequences, table)?;
    let dims = args.dims;
    let longest = positions.iter().map(|p| *p as usize + 1).max().unwrap_or(1);
    let least = SERIAL_PRODUCTS.div_ceil((2 * longest * dims.head_dim).max(1));
    let group = dims.heads / dims.kv_heads;
    let scale = args.scale * args.kv_scales.k;
    for_pieces::<Scratch>(isa, &mut out, dims.head_dim, least, |row, head, mut piece, scratch| {
        let position = positions[row] as usize;
        let first = args.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let table = table(sequences[row] as usize);
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

/// The cache rows of the given positions, one range for each KV block.
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

/// Scratch that a thread reuses for every head.
#[derive(Default)]
struct Scratch {
    query: Vec<f32>,
    scores: Vec<f32>,
    sum: Vec<f32>,
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
    let stride = keys.layout.row_stride;
    match keys.layout.dtype {
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
    let stride = values.layout.row_stride;
    match values.layout.dtype {
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
    let start = view.layout.offset;
    &view.buf.as_slice::<T>()[start..start + view.layout.span()]
}

/// All rows in f32, with their stride.
fn widen_all(isa: Isa, view: &View<'_>) -> (Vec<f32>, usize) {
    let (mut all, mut row) = (Vec::with_capacity(view.layout.rows * view.layout.cols), Vec::new());
    for r in 0..view.layout.rows {
        read_row(isa, view, r, &mut row);
        all.extend_from_slice(&row);
    }
    (all, view.layout.cols)
}
