//! Sampling.

use lora_core::ops::{SampleArgs, SampleRow};
use lora_core::{Result, check};

use crate::philox::{philox4x32, uniform};
use crate::rows::typed_row;
use crate::{CpuRef, ViewMut};

/// See [`lora_core::Backend::sample`].
pub fn sample(args: &SampleArgs<'_, CpuRef>, out: &mut ViewMut<'_>) -> Result<()> {
    check::sample(args, out.layout)?;
    let rows = args.logits.layout.rows;
    let banned = typed_row::<i32>(&args.banned, 0);
    check::ids("sample", "banned token", banned, args.logits.layout.cols)?;
    let mut tokens = Vec::with_capacity(rows);
    for r in 0..rows {
        let params: SampleRow =
            *bytemuck::from_bytes(bytemuck::cast_slice(typed_row::<i32>(&args.params, r)));
        let entry = |i| typed_row::<i32>(&args.history, i);
        let biased = |i| typed_row::<i32>(&args.bias, i);
        check::sample_ids(args, &params, |i| entry(i)[0], |i| biased(i)[0])?;
        let mut logits = typed_row::<f32>(&args.logits, r).to_vec();
        for entry in range(params.bias).map(biased) {
            logits[entry[0] as usize] += f32::from_bits(entry[1] as u32);
        }
        for entry in range(params.history).map(entry) {
            penalise(&mut logits[entry[0] as usize], entry[1] as f32, &params);
        }
        for token in &banned[range(params.banned)] {
            logits[*token as usize] = f32::NEG_INFINITY;
        }
        if params.mask != SampleRow::UNMASKED {
            apply_mask(&mut logits, typed_row(&args.masks, params.mask as usize));
        }
        tokens.push(sample_row(&logits, &params) as i32);
    }
    let start = out.layout.offset;
    out.buf.as_mut_slice::<i32>()[start..start + rows].copy_from_slice(&tokens);
    Ok(())
}

fn range([from, count]: [u32; 2]) -> std::ops::Range<usize> {
    from as usize..from as usize + count as usize
}

/// Masks the tokens whose bit is 0.
fn apply_mask(logits: &mut [f32], words: &[i32]) {
    for (token, logit) in logits.iter_mut().enumerate() {
        if (words[token / 32] >> (token % 32)) & 1 == 0 {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Applies the penalties for a seen token; `times` is its number of occurrences for presence and frequency.
fn penalise(logit: &mut f32, times: f32, params: &SampleRow) {
    let repetition = params.repetition_penalty;
    *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
    if times > 0.0 {
        *logit -= params.presence_penalty + times * params.frequency_penalty;
    }
}

/// Samples a token from penalised logits; see [`SampleRow`] for the order of filters.
fn sample_row(logits: &[f32], params: &SampleRow) -> usize {
    if params.temperature == 0.0 || params.top_k == 1 {
        return argmax(logits);
    }
    let keep =
        if params.top_k == 0 { logits.len() } else { logits.len().min(params.top_k as usize) };
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Adding zero turns -0 into +0, which the total order would distinguish.
    let key = |i: &usize| logits[*i] + 0.0;
    let likelier = |a: &usize, b: &usize| key(b).total_cmp(&key(a)).then(a.cmp(b));
    if keep < order.len() {
        order.select_nth_unstable_by(keep, likelier);
        order.truncate(keep);
    }
    order.sort_unstable_by(likelier);

    let best = logits[order[0]];
    let weights: Vec<f32> =
        order.iter().map(|t| ((logits[*t] - best) / params.temperature).exp()).collect();
    let kept = kept_by_top_p_and_min_p(&weights, params);
    let total: f32 = weights[..kept].iter().sum();

    let counter = [params.position, params.stream, 0, 0];
    let mut left = uniform(philox4x32(params.seed, counter)[0]) * total;
    for (token, weight) in order[..kept].iter().zip(&weights) {
        if left < *weight {
            return *token;
        }
        left -= weight;
    }
    // By rounding, the number can exceed the sum of the weights. A token of weight 0 may be banned, so the
    // last one with a weight is taken.
    let last = weights[..kept].iter().rposition(|weight| *weight > 0.0);
    order[last.unwrap_or(0)]
}

/// The number of leading `weights`, in descending order, that pass the filters; at least one. The first is 1.
fn kept_by_top_p_and_min_p(weights: &[f32], params: &SampleRow) -> usize {
    let mut kept = weights.len();
    if params.top_p < 1.0 {
        let target = params.top_p * weights.iter().sum::<f32>();
        let mut reached = 0.0;
        kept = weights
            .iter()
            .position(|w| {
                reached += w;
                reached >= target
            })
            .map_or(kept, |last| last + 1);
    }
    weights[..kept].iter().take_while(|w| **w >= params.min_p).count().max(1)
}

/// The index of the largest value, the first among equals.
fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(position: u32) -> SampleRow {
        SampleRow { temperature: 1.0, position, ..SampleRow::GREEDY }
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(sample_row(&[1.0, 3.0, 3.0], &SampleRow::GREEDY), 1);
    }

    #[test]
    fn a_mask_holds_at_every_bit_of_its_words() {
        for only in [0, 31, 32, 62] {
            let mut logits = vec![1.0f32; 63];
            let mut words = [0i32; 2];
            words[only / 32] = 1 << (only % 32);
            apply_mask(&mut logits, &words);
            for params in [SampleRow::GREEDY, at(7)] {
                assert_eq!(sample_row(&logits, &params), only);
            }
        }
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY];
        let mut counts = [0usize; 4];
        for position in 0..20_000 {
            counts[sample_row(&logits, &at(position))] += 1;
        }
        let total: f32 = logits.iter().map(|l| l.exp()).sum();
        for (count, logit) in counts.iter().zip(logits) {
            assert!((*count as f32 / 20_000.0 - logit.exp() / total).abs() < 0.02, "{counts:?}");
        }
    }

    proptest! {
        #[test]
        fn filters_only_ever_drop_the_unlikely(
            logits in prop::collection::vec(-8f32..8.0, 1..40),
            (top_k, top_p, min_p, position) in (0u32..10, 0f32..=1.0, 0f32..=1.0, 0u32..1000),
        ) {
            let params = SampleRow { top_k, top_p, min_p, ..at(position) };
            let token = sample_row(&logits, &params);
            let likelier = logits.iter().filter(|l| **l > logits[token]).count();
            if top_k > 0 {
                prop_assert!(likelier < top_k as usize);
            }
            let best = logits[argmax(&logits)];
            prop_assert!((logits[token] - best).exp() >= min_p);
            let total: f32 = logits.iter().map(|l| l.exp()).sum();
            let before: f32 =
                logits.iter().filter(|l| **l > logits[token]).map(|l| l.exp() / total).sum();
            prop_assert!(before <= top_p + 1e-4);
        }
    }
}
