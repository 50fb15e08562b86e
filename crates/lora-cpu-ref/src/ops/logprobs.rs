//! Log-probabilities of raw logits.

use lora_core::ops::{LogprobArgs, LogprobOut};
use lora_core::{Result, check};

use crate::rows::typed_row;
use crate::{CpuRef, ViewMut};

/// See [`lora_core::Backend::logprobs`].
pub fn logprobs(args: &LogprobArgs<'_, CpuRef>, mut out: LogprobOut<'_, CpuRef>) -> Result<()> {
    check::logprobs(args, &out)?;
    let k = out.top_ids.layout.cols;
    let targets = typed_row::<i32>(&args.targets, 0);
    check::ids("logprobs", "target", targets, args.logits.layout.cols)?;
    for (r, target) in targets.iter().enumerate() {
        let logits = typed_row::<f32>(&args.logits, r);
        let normalizer = log_sum_exp(logits);
        let target = logits[*target as usize];
        put(&mut out.target, 0, r, target - normalizer);
        put(&mut out.rank, 0, r, 1 + logits.iter().filter(|l| **l > target).count() as i32);
        for (i, token) in largest(logits, k).into_iter().enumerate() {
            put(&mut out.top_ids, r, i, token as i32);
            put(&mut out.top, r, i, logits[token] - normalizer);
        }
    }
    Ok(())
}

fn put<T: bytemuck::Pod>(out: &mut ViewMut<'_>, row: usize, col: usize, value: T) {
    out.buf.as_mut_slice::<T>()[out.layout.offset + row * out.layout.row_stride + col] = value;
}

/// `ln(sum(exp(x)))`, summed in f64 so that a long tail is not lost.
fn log_sum_exp(x: &[f32]) -> f32 {
    let best = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    best + x.iter().map(|v| f64::from(v - best).exp()).sum::<f64>().ln() as f32
}

/// Indices of the `k` largest values, largest first, lower indices first among equals.
fn largest(values: &[f32], k: usize) -> Vec<usize> {
    if k == 0 {
        return Vec::new();
    }
    let mut order: Vec<usize> = (0..values.len()).collect();
    // Adding zero turns -0 into +0, which the total order would distinguish.
    let key = |i: &usize| values[*i] + 0.0;
    let larger = |a: &usize, b: &usize| key(b).total_cmp(&key(a)).then(a.cmp(b));
    if k < order.len() {
        order.select_nth_unstable_by(k, larger);
        order.truncate(k);
    }
    order.sort_unstable_by(larger);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_come_first_and_ties_keep_their_order() {
        assert_eq!(largest(&[1.0, 5.0, 5.0, 2.0], 3), [1, 2, 3]);
        assert_eq!(largest(&[1.0], 1), [0]);
        assert!(largest(&[], 0).is_empty());
    }

    #[test]
    fn log_sum_exp_survives_large_logits() {
        assert!((log_sum_exp(&[1e4, 1e4]) - (1e4 + 2f32.ln())).abs() < 1e-2);
    }
}
