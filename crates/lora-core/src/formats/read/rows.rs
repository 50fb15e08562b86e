//! Merges trained token rows into a full weight of the same site.

use crate::adapter::{SiteWeights, TokenRows};
use crate::device::{DType, HostTensor};
use crate::formats::hashed::Hashed;

/// Replaces the weight of a site. If the adapter also trained rows of tokens, they are merged into the
/// replacement; rows that do not fit stay, and are refused by the check against the model.
pub(crate) fn replace(site: &mut SiteWeights<Hashed>, weight: Hashed) {
    let merged = site.rows.as_ref().and_then(|rows| with_rows(&weight.tensor, rows));
    site.replacement = Some(match merged {
        Some(merged) => {
            site.rows = None;
            Hashed::new(merged)
        }
        None => weight,
    });
}

/// The matrix with these rows replaced, in a dtype that represents both exactly.
fn with_rows(weight: &HostTensor, rows: &TokenRows<Hashed>) -> Option<HostTensor> {
    let TokenRows { ids, values: Hashed { tensor: values, .. } } = rows;
    let (&[vocab, width], &[count, columns]) = (weight.shape(), values.shape()) else {
        return None;
    };
    let inside = ids.iter().all(|id| (*id as usize) < vocab);
    if !inside || count != ids.len() || columns != width {
        return None;
    }
    let narrowed = values.cast(weight.dtype());
    let exact = narrowed.filter(|narrowed| narrowed.iter_f32().eq(values.iter_f32()));
    let (weight, values) = match exact {
        Some(values) => (weight.clone(), values),
        None => (weight.cast(DType::F32)?, values.cast(DType::F32)?),
    };
    let row = width * weight.dtype().size();
    let mut bytes = weight.bytes().to_vec();
    for (id, values) in ids.iter().zip(values.bytes().chunks_exact(row.max(1))) {
        bytes[*id as usize * row..][..row].copy_from_slice(values);
    }
    HostTensor::new(weight.dtype(), weight.shape().to_vec(), bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::generation::Digest;

    fn hashed(dtype: DType, shape: [usize; 2], values: &[f32]) -> Hashed {
        Hashed::new(HostTensor::from_f32(dtype, shape.to_vec(), values).unwrap())
    }

    fn merged(row: &[f32], id: u32) -> SiteWeights<Hashed> {
        let rows = TokenRows { ids: vec![id], values: hashed(DType::F32, [1, 2], row) };
        let mut site = SiteWeights { rows: Some(rows), ..SiteWeights::default() };
        replace(&mut site, hashed(DType::Bf16, [2, 2], &[1.0, 2.0, 3.0, 4.0]));
        site
    }

    #[test]
    fn rows_are_put_into_the_weight_without_rounding() {
        let site = merged(&[5.0, 6.0], 1);
        let Hashed { tensor: weight, digest } = site.replacement.unwrap();
        assert_eq!((weight.dtype(), weight.to_f32()), (DType::Bf16, vec![1.0, 2.0, 5.0, 6.0]));
        assert_eq!(digest, Digest::of(&weight));
        assert!(site.rows.is_none());
        let weight = merged(&[0.1, 6.0], 0).replacement.unwrap().tensor;
        assert_eq!((weight.dtype(), weight.to_f32()), (DType::F32, vec![0.1, 6.0, 3.0, 4.0]));
    }

    #[test]
    fn rows_that_do_not_fit_are_left_for_the_check() {
        assert!(merged(&[5.0, 6.0], 2).rows.is_some());
    }
}
