//! DoRA denominators (Liu et al., 2024, equation 5) that a device cannot compute, because the weight
//! they need is not among its base weights.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::adapter::{LowRank, SiteWeights};
use crate::device::HostTensor;
use crate::formats::AdapterError;
use crate::formats::base::BaseWeights;
use crate::modules::SiteKey;

/// The norms of `W + scale * B A` by output, for DoRA sites whose W the adapter itself replaces and for
/// the embedding, where PEFT takes norms over the vocabulary. A site whose factors do not fit W gets none;
/// the check against the model refuses it.
pub(crate) fn norms(
    sites: &BTreeMap<SiteKey, SiteWeights>,
    base: Option<&BaseWeights>,
) -> Result<BTreeMap<SiteKey, Vec<f32>>, AdapterError> {
    let mut norms = BTreeMap::new();
    for (key, site) in sites {
        let Some(low) = site.low_rank.as_ref().filter(|low| low.magnitude.is_some()) else {
            continue;
        };
        let weight = match (&site.replacement, base) {
            (Some(weight), _) => weight.clone(),
            (None, Some(base)) if *key == SiteKey::Embed => {
                base.weight(*key).map_err(|source| AdapterError::Base { site: *key, source })?
            }
            _ => continue,
        };
        let found = match key {
            SiteKey::Embed => column_norms(&weight, low),
            _ => row_norms(&weight, low),
        };
        norms.extend(found.map(|found| (*key, found)));
    }
    Ok(norms)
}

/// Norms of the rows of `W + scale * B A`, where W is `[out, in]`.
fn row_norms(weight: &HostTensor, low: &LowRank) -> Option<Vec<f32>> {
    let (output, input) = weight.matrix_dims()?;
    let (a, b) = factors(low, input, output)?;
    let norm = |o: usize| {
        let mut row: Vec<f32> = (o * input..(o + 1) * input).map(|i| weight.get_f32(i)).collect();
        for (k, a) in a.chunks_exact(input).enumerate() {
            let factor = low.scale * b[o * low.rank + k];
            row.iter_mut().zip(a).for_each(|(value, a)| *value += factor * a);
        }
        row.iter().map(|value| value * value).sum::<f32>().sqrt()
    };
    Some((0..output).into_par_iter().map(norm).collect())
}

/// Norms of the columns of `W + scale * (B A)^T`, where W is a table `[vocab, hidden]`.
fn column_norms(table: &HostTensor, low: &LowRank) -> Option<Vec<f32>> {
    // Tokens summed by one task. Fixed, so that the result does not depend on the number of threads.
    const TOKENS: usize = 4096;
    let (vocab, hidden) = table.matrix_dims()?;
    let (a, b) = factors(low, vocab, hidden)?;
    let squares = |task: usize| {
        let mut sums = vec![0.0f64; hidden];
        for token in task * TOKENS..vocab.min((task + 1) * TOKENS) {
            let z: Vec<f32> = (0..low.rank).map(|k| a[k * vocab + token]).collect();
            for (h, (sum, b)) in sums.iter_mut().zip(b.chunks_exact(low.rank)).enumerate() {
                let delta: f32 = b.iter().zip(&z).map(|(b, z)| b * z).sum();
                let value = table.get_f32(token * hidden + h) + low.scale * delta;
                *sum += f64::from(value) * f64::from(value);
            }
        }
        sums
    };
    let parts: Vec<Vec<f64>> = (0..vocab.div_ceil(TOKENS)).into_par_iter().map(squares).collect();
    let total = |h: usize| parts.iter().map(|part| part[h]).sum::<f64>().sqrt() as f32;
    Some((0..hidden).map(total).collect())
}

/// A and B in f32, if they are `[rank, input]` and `[output, rank]`.
fn factors(low: &LowRank, input: usize, output: usize) -> Option<(Vec<f32>, Vec<f32>)> {
    let fit = low.a.shape() == [low.rank, input] && low.b.shape() == [output, low.rank];
    (fit && input > 0).then(|| (low.a.to_f32(), low.b.to_f32()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::RowOrder;
    use crate::device::DType;

    fn tensor(shape: [usize; 2], values: &[f32]) -> HostTensor {
        HostTensor::from_f32(DType::F32, shape.to_vec(), values).unwrap()
    }

    fn low(a: HostTensor, b: HostTensor) -> LowRank {
        let rows = RowOrder::ByPart;
        LowRank { rank: 1, scale: 2.0, a, b, magnitude: None, b_bias: None, rows }
    }

    #[test]
    fn norms_are_those_of_the_sum() {
        // W + 2 B A = [1 2; 0 0] + 2 [1; 2] [1 0] = [3 2; 4 0].
        let pair = low(tensor([1, 2], &[1.0, 0.0]), tensor([2, 1], &[1.0, 2.0]));
        let weight = tensor([2, 2], &[1.0, 2.0, 0.0, 0.0]);
        assert_eq!(row_norms(&weight, &pair).unwrap(), [13.0f32.sqrt(), 4.0]);
        // The table is the transpose: columns of [1 0; 2 0] + 2 ([1; 2] [1 0])^T = [3 4; 2 0].
        let table = tensor([2, 2], &[1.0, 0.0, 2.0, 0.0]);
        assert_eq!(column_norms(&table, &pair).unwrap(), [13.0f32.sqrt(), 4.0]);
        assert!(row_norms(&tensor([3, 2], &[0.0; 6]), &pair).is_none());
    }
}
