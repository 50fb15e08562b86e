//! Sampling by the definitions, in `f64`.

use lora_core::ops::SampleRow;

use std::cmp::Ordering;

/// Tolerance for probabilities that are compared with thresholds.
const SLACK: f64 = 3e-5;

/// A row's seen tokens, biases, bans and mask.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Seen tokens and their counts.
    pub history: Vec<[i32; 2]>,
    /// Tokens, and the bias of their logits.
    pub bias: Vec<(i32, f32)>,
    /// Banned tokens.
    pub banned: Vec<i32>,
    /// Whether each token is allowed; `None` allows all.
    pub mask: Option<Vec<bool>>,
}

/// The acceptable tokens: one, or several if a number is so close to a threshold that rounding decides.
pub fn allowed(logits: &[f32], row: &SampleRow, seen: &Seen) -> Vec<usize> {
    let logits = penalised(logits, row, seen);
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // The sort is stable, so equals stay in ascending order.
    order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap_or(Ordering::Equal));
    if row.temperature == 0.0 || row.top_k == 1 {
        order.truncate(1);
        return order;
    }
    if row.top_k > 0 {
        order.truncate(row.top_k as usize);
    }
    let best = f64::from(logits[order[0]]);
    let weight = |t: &usize| ((f64::from(logits[*t]) - best) / f64::from(row.temperature)).exp();
    let weights: Vec<f64> = order.iter().map(weight).collect();

    let number = f64::from(uniform(row));
    let (mut first, mut last) = (usize::MAX, 0);
    for [a, b, c] in corners() {
        let kept = kept(&weights, f64::from(row.top_p), f64::from(row.min_p), [a, b]);
        let place = place(&weights[..kept], number + c);
        (first, last) = (first.min(place), last.max(place));
    }
    order[first..=last].to_vec()
}

/// Every combination of moving three thresholds down, not at all, or up.
fn corners() -> impl Iterator<Item = [f64; 3]> {
    let step = |i: u32, digit: u32| SLACK * (f64::from(i / 3u32.pow(digit) % 3) - 1.0);
    (0..27).map(move |i| [step(i, 0), step(i, 1), step(i, 2)])
}

/// The logits after bias, repetition, presence and frequency penalties, bans and mask. Computed in `f32`,
/// as rounding can decide which of two tokens is more likely.
fn penalised(logits: &[f32], row: &SampleRow, seen: &Seen) -> Vec<f32> {
    let mut logits = logits.to_vec();
    for (token, bias) in &seen.bias {
        logits[*token as usize] += bias;
    }
    for [token, times] in &seen.history {
        let logit = &mut logits[*token as usize];
        let repetition = row.repetition_penalty;
        *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
        if *times > 0 {
            *logit -= row.presence_penalty + *times as f32 * row.frequency_penalty;
        }
    }
    for token in &seen.banned {
        logits[*token as usize] = f32::NEG_INFINITY;
    }
    for (logit, allowed) in logits.iter_mut().zip(seen.mask.iter().flatten()) {
        if !allowed {
            *logit = f32::NEG_INFINITY;
        }
    }
    logits
}

/// The number of leading weights, in descending order, that pass top-p, then min-p, with both thresholds moved.
fn kept(weights: &[f64], top_p: f64, min_p: f64, slack: [f64; 2]) -> usize {
    let total: f64 = weights.iter().sum();
    let mut count = weights.len();
    if top_p < 1.0 {
        let mut reached = 0.0;
        let last = weights.iter().position(|w| {
            reached += w / total;
            reached >= top_p + slack[0]
        });
        count = last.map_or(count, |last| last + 1);
    }
    weights[..count].iter().take_while(|w| **w >= min_p * (1.0 + slack[1])).count().max(1)
}

/// The index of the first weight at which the cumulative sum exceeds the fraction `number` of the total.
fn place(weights: &[f64], number: f64) -> usize {
    let mut left = number * weights.iter().sum::<f64>();
    for (i, weight) in weights.iter().enumerate() {
        if left < *weight {
            return i;
        }
        left -= weight;
    }
    // The number was so close to 1 that the tolerance moved it beyond the last token.
    weights.iter().rposition(|w| *w > 0.0).unwrap_or(0)
}

/// The random number of a row: the upper 24 bits of the first word.
fn uniform(row: &SampleRow) -> f32 {
    (philox(row.seed, [row.position, row.stream, 0, 0])[0] >> 8) as f32 / 16_777_216.0
}

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, section 3.3).
fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let wide = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        ((product >> 32) as u32, product as u32)
    };
    (0..10u32).fold(counter, |[r0, l0, r1, l1], round| {
        let key0 = key[0].wrapping_add(round.wrapping_mul(0x9E37_79B9));
        let key1 = key[1].wrapping_add(round.wrapping_mul(0xBB67_AE85));
        let (high0, low0) = wide(0xD251_1F53, r0);
        let (high1, low1) = wide(0xCD9E_8D57, r1);
        [high1 ^ l0 ^ key0, low1, high0 ^ l1 ^ key1, low0]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_answer() {
        let key = [0xa409_3822, 0x299f_31d0];
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(key, counter), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn a_clear_case_allows_one_token() {
        let row = SampleRow { temperature: 1.0, ..SampleRow::GREEDY };
        assert_eq!(allowed(&[0.0, 50.0, 1.0], &row, &Seen::default()), [1]);
    }
}
