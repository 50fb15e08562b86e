//! The content hash that identifies an adapter.

use std::collections::BTreeMap;

use super::{LowRank, RowOrder, SiteWeights, TokenRows};
use crate::device::{DType, HostTensor};
use crate::ids::Generation;
use crate::modules::SiteKey;

/// Version of the byte streams below, so that hashes of different versions differ.
const CONTEXT: &[u8] = b"loramux adapter 2";

/// Hash of a tensor's dtype, shape and elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Digest([u8; 32]);

impl Digest {
    /// Hashes a tensor.
    pub fn of(tensor: &HostTensor) -> Self {
        let mut hasher = Stream(blake3::Hasher::new());
        hasher.0.update(&[dtype_tag(tensor.dtype())]);
        hasher.number(tensor.shape().len());
        for &extent in tensor.shape() {
            hasher.number(extent);
        }
        hasher.0.update(tensor.bytes());
        Self(*hasher.0.finalize().as_bytes())
    }
}

/// Hashes the sites in their order, with everything that affects the result.
///
/// Every variable part is preceded by its length or count, so that no two adapters have the same byte
/// stream. The file's layout is not hashed, as tensors have been brought into canonical form.
pub(crate) fn of_sites(sites: &BTreeMap<SiteKey, SiteWeights<Digest>>) -> Generation {
    let mut hasher = Stream(blake3::Hasher::new());
    hasher.0.update(CONTEXT);
    hasher.number(sites.len());
    for (key, site) in sites {
        hasher.key(*key);
        hasher.low_rank(site.low_rank.as_ref());
        hasher.tensor(site.base_bias.as_ref());
        hasher.tensor(site.replacement.as_ref());
    }
    // Hashed last, and only if present, so that adapters without them keep the hash of older versions.
    for (key, rows) in sites.iter().filter_map(|(key, site)| Some((key, site.rows.as_ref()?))) {
        hasher.key(*key);
        hasher.rows(rows);
    }
    Generation(*hasher.0.finalize().as_bytes())
}

struct Stream(blake3::Hasher);

impl Stream {
    fn number(&mut self, value: usize) {
        self.0.update(&(value as u64).to_le_bytes());
    }

    fn key(&mut self, key: SiteKey) {
        let (kind, layer, module) = match key {
            SiteKey::Embed => (0, 0, 0),
            SiteKey::Layer(layer, module) => (1, layer.0, module.id()),
            SiteKey::Head => (2, 0, 0),
            SiteKey::Norm(layer, kind) => (3, layer.0, kind as u8),
            SiteKey::FinalNorm => (4, 0, 0),
        };
        self.0.update(&[kind, module]).update(&layer.to_le_bytes());
    }

    fn low_rank(&mut self, low: Option<&LowRank<Digest>>) {
        self.0.update(&[u8::from(low.is_some())]);
        let Some(low) = low else { return };
        self.number(low.rank);
        self.0.update(&low.scale.to_bits().to_le_bytes());
        self.0.update(&[match low.rows {
            RowOrder::ByPart => 0,
            RowOrder::ByKvHead => 1,
        }]);
        self.tensor(Some(&low.a));
        self.tensor(Some(&low.b));
        self.tensor(low.magnitude.as_ref());
        self.tensor(low.b_bias.as_ref());
    }

    fn rows(&mut self, rows: &TokenRows<Digest>) {
        self.number(rows.ids.len());
        for id in &rows.ids {
            self.0.update(&id.to_le_bytes());
        }
        self.tensor(Some(&rows.values));
    }

    fn tensor(&mut self, tensor: Option<&Digest>) {
        self.0.update(&[u8::from(tensor.is_some())]);
        if let Some(Digest(digest)) = tensor {
            self.0.update(digest);
        }
    }
}

/// A tag for each dtype.
fn dtype_tag(dtype: DType) -> u8 {
    match dtype {
        DType::F32 => 1,
        DType::F16 => 2,
        DType::Bf16 => 3,
        DType::I32 => 4,
        DType::F8E4m3 => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::LayerIdx;
    use crate::modules::TargetModule;

    fn site(scale: f32, values: &[f32], shape: [usize; 2]) -> SiteWeights {
        let tensor = |s: [usize; 2]| HostTensor::from_f32(DType::F32, s.to_vec(), values).unwrap();
        let low_rank = LowRank {
            rank: shape[0],
            scale,
            a: tensor(shape),
            b: tensor([shape[1], shape[0]]),
            magnitude: None,
            b_bias: None,
            rows: RowOrder::ByPart,
        };
        SiteWeights { low_rank: Some(low_rank), ..SiteWeights::default() }
    }

    fn hash(layer: u32, site: SiteWeights) -> Generation {
        let key = SiteKey::Layer(LayerIdx(layer), TargetModule::AttnQ);
        of_sites(&BTreeMap::from([(key, site.map(|tensor| Digest::of(&tensor)))]))
    }

    #[test]
    fn whatever_changes_the_result_changes_the_hash() {
        let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let base = hash(0, site(2.0, &values, [2, 3]));
        assert_eq!(base, hash(0, site(2.0, &values, [2, 3])));
        let mut biased = site(2.0, &values, [2, 3]);
        biased.base_bias = HostTensor::from_f32(DType::F32, vec![3], &values[..3]);
        let others = [
            hash(1, site(2.0, &values, [2, 3])),
            hash(0, site(2.5, &values, [2, 3])),
            hash(0, site(2.0, &values, [3, 2])),
            hash(0, site(2.0, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.5], [2, 3])),
            hash(0, biased),
        ];
        assert!(others.iter().all(|other| *other != base));
    }

    #[test]
    fn a_tensor_in_another_role_changes_the_hash() {
        let bias = HostTensor::from_f32(DType::F32, vec![2], &[1.0, 2.0]);
        let as_bias = SiteWeights { base_bias: bias.clone(), ..SiteWeights::default() };
        let as_weight = SiteWeights { replacement: bias, ..SiteWeights::default() };
        assert_ne!(hash(0, as_bias), hash(0, as_weight));
    }

    #[test]
    fn rows_of_other_tokens_are_another_adapter() {
        let values = HostTensor::from_f32(DType::F32, vec![1, 2], &[1.0, 2.0]).unwrap();
        let of = |id| {
            let rows = Some(TokenRows { ids: vec![id], values: values.clone() });
            hash(0, SiteWeights { rows, ..SiteWeights::default() })
        };
        assert_ne!(of(3), of(4));
        assert_ne!(of(3), hash(0, SiteWeights::default()));
    }
}
