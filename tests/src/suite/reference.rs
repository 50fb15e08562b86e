//! The formulas of the ops, in f64.

use lora_core::HostTensor;
use lora_core::lora::{SiteKind, SlotRows, SlotSlice};
use lora_core::ops::HeadDims;

use super::num::Num;
use super::rig::Matrix;

/// The inner product.
pub fn dot(x: &[Num], w: &[Num]) -> Num {
    x.iter().zip(w).map(|(x, w)| *x * *w).sum()
}

/// `x wᵀ + bias`, where `w` is `[out, in]`.
pub fn linear(x: &Matrix, w: &Matrix, bias: Option<&[f32]>) -> Vec<Num> {
    let weights: Vec<_> = (0..w.rows).map(|n| w.nums(n)).collect();
    let row = |r: usize| {
        let x = x.nums(r);
        let bias = |n: usize| Num::of(bias.map_or(0.0, |bias| bias[n].into()));
        weights.iter().enumerate().map(|(n, w)| dot(&x, w) + bias(n)).collect::<Vec<_>>()
    };
    (0..x.rows).flat_map(row).collect()
}

/// `x / sqrt(mean(x^2) + eps) * w` of one row.
pub fn rms_norm(x: &[Num], w: &[Num], eps: f32) -> Vec<Num> {
    let square: f64 = x.iter().map(|x| x.value * x.value).sum();
    let root = (square / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(w).map(|(x, w)| Num::of(x.value / root * w.value)).collect()
}

/// `gate * sigmoid(gate) * up`.
pub fn silu_mul(gate: f64, up: f64) -> Num {
    Num::of(gate / (1.0 + (-gate).exp()) * up)
}

/// The same for a gate and an up value that are sums with rounding errors.
pub fn gated(gate: Num, up: Num) -> Num {
    // The slope of silu is at most 1.1. The error of each factor is multiplied by the other, including its
    // error.
    const SLOPE: f64 = 1.1;
    let [silu, value] = [1.0, up.value].map(|up| silu_mul(gate.value, up).value);
    let up_at_most = up.value.abs() + up.size / 128.0;
    Num { value, size: SLOPE * gate.size * up_at_most + silu.abs() * up.size }
}

/// RoPE of one head: rotates the elements `i` and `i + half` by angle `i`. `cos_sin` holds the cosines,
/// then the sines.
pub fn rope(head: &[Num], cos_sin: &[Num]) -> Vec<Num> {
    let half = head.len() / 2;
    let (cos, sin) = cos_sin.split_at(half);
    let low = (0..half).map(|i| head[i] * cos[i] - head[i + half] * sin[i]);
    let high = (0..half).map(|i| head[i + half] * cos[i] + head[i] * sin[i]);
    low.chain(high).collect()
}

/// Softmax attention of one row of queries to keys and values `[positions, kv_cols]`, in sequence order.
pub fn attention(
    queries: &[Num],
    keys: &[Vec<Num>],
    values: &[Vec<Num>],
    dims: HeadDims,
    scale: f32,
) -> Vec<Num> {
    let size = dims.head_dim;
    let head = |h: usize| {
        let query = &queries[h * size..(h + 1) * size];
        let from = h / (dims.heads / dims.kv_heads) * size;
        let scores: Vec<_> =
            keys.iter().map(|k| dot(query, &k[from..from + size]) * f64::from(scale)).collect();
        let best = scores.iter().map(|s| s.value).fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|s| (s.value - best).exp()).sum();
        // The error of a score is a relative error of its weight and, through the sum, of all others.
        let error = 1.0 + 2.0 * scores.iter().map(|s| s.size).fold(0.0, f64::max);
        let weight = |s: &Num| (s.value - best).exp() / total;
        let element = |d: usize| {
            let terms = scores.iter().zip(values).map(|(s, v)| v[from + d] * weight(s));
            let sum: Num = terms.sum();
            Num { size: sum.size * error, ..sum }
        };
        (0..size).map(element).collect::<Vec<_>>()
    };
    (0..dims.heads).flat_map(head).collect()
}

/// Applies a slice of an adapter to the base output `y` of one row: `gain * (y + scale * B (A x)) + shift`,
/// where `y` is computed anew if the matrix or rows of tokens are replaced.
pub fn adapted(kind: SiteKind, slice: &SlotSlice, x: &Input, y: &[Num]) -> Vec<Num> {
    let low_rank = slice.low_rank.as_ref().map(|low| {
        let z = x.times(&low.a);
        let b = rows_of(&low.b);
        b.iter().map(|b| dot(b, &z) * f64::from(low.scale)).collect::<Vec<_>>()
    });
    let replaced = slice.replacement.as_ref().map(|w| match (kind, x) {
        (SiteKind::Embedding, Input::OneHot(id)) => rows_of(w).swap_remove(*id),
        _ => x.times(w),
    });
    let mut base = replaced.unwrap_or_else(|| y.to_vec());
    if let Some(SlotRows { ids, values }) = &slice.rows {
        match (kind, x) {
            (SiteKind::Embedding, Input::OneHot(id)) => {
                let place = ids.iter().position(|token| *token as usize == *id);
                base = place.map_or(base, |place| rows_of(values).swap_remove(place));
            }
            _ => ids.iter().zip(x.times(values)).for_each(|(id, y)| base[*id as usize] = y),
        }
    }
    let element = |n: usize| {
        let base = base[n];
        let delta = low_rank.as_ref().map_or(Num::of(0.0), |values| values[n]);
        let gain = slice.gain.as_ref().map_or(1.0, |gain| gain[n].into());
        let shift = slice.shift.as_ref().map_or(0.0, |shift| shift[n].into());
        (base + delta) * gain + Num::of(shift)
    };
    (0..y.len()).map(element).collect()
}

/// Input of a base layer.
pub enum Input {
    /// A row of activations.
    Row(Vec<Num>),
    /// The one-hot row of a token id.
    OneHot(usize),
}

impl Input {
    /// `w x` for a matrix `[out, in]`.
    fn times(&self, w: &HostTensor) -> Vec<Num> {
        rows_of(w)
            .iter()
            .map(|w| match self {
                Self::Row(x) => dot(w, x),
                Self::OneHot(id) => w[*id],
            })
            .collect()
    }
}

/// The rows of a matrix on the host.
pub fn rows_of(tensor: &HostTensor) -> Vec<Vec<Num>> {
    let Some((rows, cols)) = tensor.matrix_dims() else { return Vec::new() };
    let matrix = Matrix { rows, cols, data: tensor.clone() };
    (0..rows).map(|r| matrix.nums(r)).collect()
}
