//! Causal attention over paged keys and values, a row and a head at a time.

use half::{bf16, f16};
use lora_core::ops::AttentionArgs;
use lora_core::{DType, Error, Result, check_extent};

use crate::inner::{Isa, axpy, dot};
use crate::rows::{Element, check_float, checked_index, for_pieces, indices, typed_row};
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
    for_pieces::<Scratch>(&mut out, dims.head_dim, least, |row, head, mut piece, scratch| {
        let position = positions[row] as usize;
        let first = args.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let table = typed_row::<i32>(&args.block_tables, sequences[row] as usize);
        let place = |p: usize| {
            table[p / args.tokens_per_block] as usize * args.tokens_per_block
                + p % args.tokens_per_block
        };
        let columns = head / group * dims.head_dim..(head / group + 1) * dims.head_dim;
        let queries = args.queries.slice_cols(head * dims.head_dim..(head + 1) * dims.head_dim);
        crate::rows::read_row(&queries, row, &mut scratch.query);

        let keys = args.k_cache.slice_cols(columns.clone());
        scratch.scores.clear();
        for p in first..=position {
            scratch.scores.push(args.scale * key_product(isa, &scratch.query, &keys, place(p)));
        }
        let total = exponentials(&mut scratch.scores);
        let values = args.v_cache.slice_cols(columns);
        scratch.sum.clear();
        scratch.sum.resize(dims.head_dim, 0.0);
        for (p, weight) in (first..=position).zip(&scratch.scores) {
            add_value(isa, &mut scratch.sum, *weight, &values, place(p));
        }
        piece.store(scratch.sum.iter().map(|v| v / total));
    });
    Ok(())
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
    check_float(OP, "k_cache", args.k_cache.geo.dtype)?;
    check_float(OP, "out", out.geo.dtype)?;
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
fn exponentials(scores: &mut [f32]) -> f32 {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for score in scores {
        *score = (*score - largest).exp();
        total += *score;
    }
    total
}

fn key_product(isa: Isa, query: &[f32], keys: &View<'_>, row: usize) -> f32 {
    match keys.geo.dtype {
        DType::Bf16 => dot(isa, query, typed_row::<bf16>(keys, row)),
        DType::F16 => dot(isa, query, &widen(typed_row(keys, row))),
        _ => dot(isa, query, typed_row::<f32>(keys, row)),
    }
}

fn add_value(isa: Isa, sum: &mut [f32], weight: f32, values: &View<'_>, row: usize) {
    match values.geo.dtype {
        DType::Bf16 => axpy(isa, sum, weight, typed_row::<bf16>(values, row)),
        DType::F16 => axpy(isa, sum, weight, &widen(typed_row(values, row))),
        _ => axpy(isa, sum, weight, typed_row::<f32>(values, row)),
    }
}

fn widen(row: &[f16]) -> Vec<f32> {
    row.iter().map(|v| v.widen()).collect()
}
