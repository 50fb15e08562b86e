//! QK norms, rotary position embedding (Su et al., 2021), and the append to the KV cache.

use lora_core::ops::QkvArgs;
use lora_core::{Result, check};

use super::norm::{RowWeights, normalize};
use crate::inner::Isa;
use crate::rows::{for_rows, read_row, row_mut, typed_row};
use crate::{CpuRef, View, ViewMut};

/// See [`lora_core::Backend::qk_norm_rope_append`].
pub fn qk_norm_rope_append(isa: Isa, mut args: QkvArgs<'_, CpuRef>) -> Result<()> {
    const OP: &str = "qk_norm_rope_append";
    check::qkv(&args)?;
    let dims = args.dims;
    let positions = typed_row::<i32>(&args.positions, 0);
    let slots = typed_row::<i32>(&args.kv_slots, 0);
    check::qkv_ids(&args, positions, slots)?;
    let norms = match &args.norms {
        Some((q, k, eps)) => Some((RowWeights::new(OP, q)?, RowWeights::new(OP, k)?, *eps)),
        None => None,
    };
    rotate(
        isa,
        &mut args.qkv,
        &args.cos_sin_table,
        positions,
        |row, head| match &norms {
            Some((q, _, eps)) if head < dims.heads => Some((q.of(row), *eps)),
            Some((_, k, eps)) => Some((k.of(row), *eps)),
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

/// Normalises and rotates the first `heads` heads of every row in place. `norm` returns the weight and
/// epsilon for a head of a row, if heads are normalised.
fn rotate<'w>(
    isa: Isa,
    qkv: &mut ViewMut<'_>,
    cos_sin_table: &View<'_>,
    positions: &[i32],
    norm: impl Fn(usize, usize) -> Option<(&'w [f32], f32)> + Sync,
    heads: usize,
) {
    let half = cos_sin_table.layout.cols / 2;
    for_rows(isa, qkv, |r, mut row, scratch| {
        row.read(scratch);
        let (cos, sin) = typed_row::<f32>(cos_sin_table, positions[r] as usize).split_at(half);
        for (h, head) in scratch.chunks_exact_mut(2 * half).take(heads).enumerate() {
            if let Some((w, eps)) = norm(r, h) {
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
