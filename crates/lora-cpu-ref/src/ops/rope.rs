//! Head norms, rotary positions (Su et al., 2021) and the store into the KV cache.

use lora_core::ops::QkvArgs;
use lora_core::{DType, Error, Result, check_extent};

use super::norm::{normalize, weights};
use crate::inner::Isa;
use crate::rows::{
    check_cache, check_float, checked_index, for_rows, indices, read_row, row_mut, typed_row,
};
use crate::{CpuRef, View, ViewMut};

const OP: &str = "qk_norm_rope_append";

/// See [`lora_core::Backend::qk_norm_rope_append`].
pub fn qk_norm_rope_append(isa: Isa, mut args: QkvArgs<'_, CpuRef>) -> Result<()> {
    let (dims, rows) = (args.dims, args.qkv.geo.rows);
    check_float(OP, "qkv", args.qkv.geo.dtype)?;
    check_extent(OP, "columns of qkv", args.qkv.geo.cols, dims.q_cols() + 2 * dims.kv_cols())?;
    for cache in [&args.k_cache, &args.v_cache] {
        check_cache(OP, "cache", cache.geo.dtype)?;
        check_extent(OP, "columns of a cache", cache.geo.cols, dims.kv_cols())?;
    }
    check_extent(OP, "rows of v_cache", args.v_cache.geo.rows, args.k_cache.geo.rows)?;
    let positions = indices(OP, "positions", &args.positions)?;
    let slots = indices(OP, "kv_slots", &args.kv_slots)?;
    check_extent(OP, "positions", positions.len(), rows)?;
    check_extent(OP, "kv_slots", slots.len(), rows)?;
    check_extent(OP, "head_dim modulo 2", dims.head_dim % 2, 0)?;
    let rotations = args.rotations.geo;
    if rotations.dtype != DType::F32 {
        let (what, found) = ("rotations", rotations.dtype);
        return Err(Error::DType { op: OP, what, found, allowed: "float32" });
    }
    check_extent(OP, "columns of rotations", rotations.cols, dims.head_dim)?;
    for position in positions {
        checked_index(OP, "position", *position, rotations.rows)?;
    }
    for slot in slots.iter().filter(|slot| **slot != -1) {
        checked_index(OP, "KV slot", *slot, args.k_cache.geo.rows)?;
    }
    let norms = match &args.norms {
        Some((q, k, eps)) => {
            Some((weights(OP, q, dims.head_dim)?, weights(OP, k, dims.head_dim)?, *eps))
        }
        None => None,
    };
    rotate(
        isa,
        &mut args.qkv,
        &args.rotations,
        positions,
        |head| match norms {
            Some((q, _, eps)) if head < dims.heads => Some((q, eps)),
            Some((_, k, eps)) => Some((k, eps)),
            None => None,
        },
        dims.heads + dims.kv_heads,
    );
    let k_from = dims.q_cols();
    let v_from = k_from + dims.kv_cols();
    let qkv = args.qkv.as_view();
    let (k, v) = (qkv.slice_cols(k_from..v_from), qkv.slice_cols(v_from..v_from + dims.kv_cols()));
    append(isa, k, args.kv_scales.k, slots, &mut args.k_cache);
    append(isa, v, args.kv_scales.v, slots, &mut args.v_cache);
    Ok(())
}

/// Normalises and rotates the first `heads` heads of every row, in place.
fn rotate<'w>(
    isa: Isa,
    qkv: &mut ViewMut<'_>,
    rotations: &View<'_>,
    positions: &[i32],
    norm: impl Fn(usize) -> Option<(&'w [f32], f32)> + Sync,
    heads: usize,
) {
    let half = rotations.geo.cols / 2;
    for_rows(isa, qkv, |r, mut row, scratch| {
        row.read(scratch);
        let (cos, sin) = typed_row::<f32>(rotations, positions[r] as usize).split_at(half);
        for (h, head) in scratch.chunks_exact_mut(2 * half).take(heads).enumerate() {
            if let Some((w, eps)) = norm(h) {
                normalize(isa, head, w, eps);
            }
            let (lo, hi) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b) = (lo[i], hi[i]);
                lo[i] = a * cos[i] - b * sin[i];
                hi[i] = b * cos[i] + a * sin[i];
            }
        }
        row.store(scratch);
    });
}

/// Stores row `i` of `x` divided by `scale` in row `slots[i]` of the cache, rounded to its dtype.
fn append(isa: Isa, x: View<'_>, scale: f32, slots: &[i32], cache: &mut ViewMut<'_>) {
    let mut values = Vec::new();
    for (r, slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
        read_row(isa, &x, r, &mut values);
        values.iter_mut().for_each(|value| *value /= scale);
        row_mut(isa, cache, *slot as usize).store(&values);
    }
}
