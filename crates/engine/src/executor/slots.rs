//! Writes adapters into the slots of a model's sites: turns PEFT-style weights (LoRA, DoRA, biases, whole
//! weights) into the slot's general form, and keeps this rank's part of them.

use std::ops::Range;

use lora_core::lora::{SlotLowRank, SlotRows, SlotSlice};
use lora_core::ops::HostUpdate;
use lora_core::{Adapter, Backend, Comm, HostTensor, LowRank, SiteKey, SiteWeights};

use crate::adapters::{SiteWrite, WriteError};
use crate::model::{Decoder, LinearSite, Norm, Part, Site};

/// Writes an adapter's weights for one site into a slot, or clears the slot there. Returns the bytes
/// written.
///
/// # Errors
/// [`WriteError`] with the site and the device's error.
pub fn write_site<B: Backend>(
    be: &B,
    q: &mut B::Queue,
    model: &mut Decoder<B>,
    write: SiteWrite<'_>,
) -> Result<usize, WriteError> {
    let adapter = write.adapter.map(|adapter| &**adapter);
    let (comm, mut sites) = model.sites_mut();
    let mut writer = Writer { be, comm, q, slot: write.slot, adapter };
    match sites.nth(write.site) {
        Some(Site::Linear(site)) => writer.write(site),
        Some(Site::Norm(key, norm)) => writer.write_norm(norm, key),
        None => Ok(0),
    }
}

struct Writer<'a, B: Backend> {
    be: &'a B,
    comm: &'a B::Comm,
    q: &'a mut B::Queue,
    slot: usize,
    adapter: Option<&'a Adapter>,
}

impl<B: Backend> Writer<'_, B> {
    /// Writes the adapter's weight of a norm and returns its bytes.
    fn write_norm(&mut self, norm: &mut Norm<B>, key: SiteKey) -> Result<usize, WriteError> {
        let site = self.adapter.and_then(|adapter| adapter.sites.get(&key));
        let weight = site.and_then(|site| site.replacement.as_ref());
        norm.write(self.be, self.q, self.slot, weight)
            .map_err(|cause| WriteError { site: key.to_string(), cause })?;
        Ok(weight.map_or(0, |weight| weight.bytes().len()))
    }

    /// Writes the adapter's slices of a linear site and returns their bytes.
    fn write(&mut self, linear: LinearSite<'_, B>) -> Result<usize, WriteError> {
        let LinearSite { keys, weight, bias, parts, site } = linear;
        let (keys, columns) = (keys.all(), site.spec.slices.clone());
        let located = |cause| WriteError { site: format!("{keys:?}"), cause };
        let mut slices = Vec::with_capacity(keys.len());
        let mut bytes = 0;
        for ((key, columns), part) in keys.iter().zip(columns).zip(parts) {
            slices.push(match self.adapter.and_then(|adapter| adapter.sites.get(key)) {
                Some(weights) => {
                    let weights = part.of_adapter(weights);
                    let at = Module { key: *key, part, columns, weight, bias };
                    bytes += weights.tensors().map(|t| t.bytes().len()).sum::<usize>();
                    Some(self.slice(&at, &weights).map_err(located)?)
                }
                None => None,
            });
        }
        self.be.write_slot(self.q, site, self.slot, &slices).map_err(located)?;
        Ok(bytes)
    }

    /// Turns an adapter's tensors at one module into the general form of [`lora_core::lora::LoraSite`].
    fn slice(&self, at: &Module<'_, B>, weights: &SiteWeights) -> lora_core::Result<SlotSlice> {
        let low_rank = weights.low_rank.as_ref();
        let gain = match low_rank.and_then(|low| Some((low, low.magnitude.as_ref()?))) {
            Some((low, magnitude)) => Some(dora_gain::<B>(magnitude, &self.dora_norms(at, low)?)?),
            None => None,
        };
        let old_bias = at.bias.map(|bias| &bias[at.columns.clone()]);
        Ok(SlotSlice {
            low_rank: low_rank.map(|low| SlotLowRank {
                a: low.a.clone(),
                b: low.b.clone(),
                scale: low.scale,
            }),
            shift: shift(weights, old_bias, gain.as_deref()),
            gain,
            replacement: weights.replacement.clone(),
            rows: weights
                .rows
                .as_ref()
                .map(|rows| SlotRows { ids: rows.ids.clone(), values: rows.values.clone() }),
        })
    }

    /// `rownorm(W + scale B A)`, from the adapter's file if that has the norms, else computed from the base
    /// model's W. Where the columns of a row are split over ranks, their sums of squares are added.
    fn dora_norms(&self, at: &Module<'_, B>, low: &LowRank) -> lora_core::Result<Vec<f32>> {
        let known = self.adapter.and_then(|adapter| adapter.norms.get(&at.key));
        match (known, at.part) {
            (Some(norms), Part::Rows(range)) => return Ok(norms[range.clone()].to_vec()),
            (Some(norms), _) => return Ok(norms.clone()),
            (None, _) => (),
        }
        let columns = at.columns.clone();
        let rows = columns.len();
        let update = HostUpdate { a: &low.a, b: &low.b, scale: low.scale };
        let norms = self.be.row_norms(at.weight, columns, update);
        match at.part {
            Part::Cols(..) => {
                // A rank that failed still takes part in the sum, so that others do not wait for it, and
                // sends NaN, so that they fail, too.
                let squares = match &norms {
                    Ok(norms) => norms.iter().map(|norm| norm * norm).collect(),
                    Err(_) => vec![f32::NAN; rows],
                };
                let sums = self.comm.sum_on_host(squares)?;
                norms.map(|_| sums.into_iter().map(f32::sqrt).collect())
            }
            Part::Whole | Part::Rows(_) => norms,
        }
    }
}

/// One module of a site.
struct Module<'a, B: Backend> {
    key: SiteKey,
    /// This rank's part of it.
    part: &'a Part,
    /// Its columns of the site's output.
    columns: Range<usize>,
    /// Base weight of the site.
    weight: &'a B::Linear,
    /// Base bias of the site.
    bias: Option<&'a [f32]>,
}

/// `magnitude / rownorm(W + scale B A)` (Liu et al., 2024, equation 5).
fn dora_gain<B: Backend>(magnitude: &HostTensor, norms: &[f32]) -> lora_core::Result<Vec<f32>> {
    // A zero row has no direction that a magnitude could scale.
    if let Some(row) = norms.iter().position(|norm| *norm == 0.0 || !norm.is_finite()) {
        let what = format!("DoRA where row {row} of W + scale B A has norm {}", norms[row]);
        return Err(lora_core::Error::Unsupported { op: "dora", backend: B::NAME, what });
    }
    Ok(magnitude.iter_f32().zip(norms).map(|(m, n)| m / n).collect())
}

/// The summand that turns `gain * (W x + b0 + scale B A x)` into
/// `gain * (W x + scale (B A x + b_bias)) + b1`, where `b0` is the base bias and `b1` the
/// adapter's, or the base's where it has none. Where the adapter replaces W, `b0` is not added first.
/// `None` where the summand is zero.
fn shift(
    weights: &SiteWeights,
    old_bias: Option<&[f32]>,
    gain: Option<&[f32]>,
) -> Option<Vec<f32>> {
    let b_bias = weights.low_rank.as_ref().and_then(|l| Some((l.b_bias.as_ref()?, l.scale)));
    let replaced = weights.replacement.is_some();
    let moves_base = (gain.is_some() || replaced) && old_bias.is_some();
    if weights.base_bias.is_none() && b_bias.is_none() && !moves_base {
        return None;
    }
    let new_bias = weights.base_bias.as_ref().map(HostTensor::to_f32);
    let b_bias = b_bias.map(|(bias, scale)| (bias.to_f32(), scale));
    let len = new_bias.as_ref().map(Vec::len);
    let len = len.or(b_bias.as_ref().map(|(b, _)| b.len())).or(old_bias.map(<[f32]>::len))?;
    let at = |values: Option<&[f32]>, i: usize| values.map_or(0.0, |v| v[i]);
    let shift = (0..len).map(|i| {
        let gain = gain.map_or(1.0, |g| g[i]);
        let old = at(old_bias, i);
        let new = new_bias.as_ref().map_or(old, |b| b[i]);
        let of_b = b_bias.as_ref().map_or(0.0, |(b, scale)| scale * b[i]);
        let of_base = if replaced { 0.0 } else { old };
        gain * (of_b - of_base) + new
    });
    Some(shift.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_core::DType;

    fn bias(values: &[f32]) -> Option<HostTensor> {
        HostTensor::from_f32(DType::F32, vec![values.len()], values)
    }

    #[test]
    fn a_replaced_bias_subtracts_the_base_bias() {
        let weights = SiteWeights { base_bias: bias(&[5.0]), ..SiteWeights::default() };
        assert_eq!(shift(&weights, Some(&[2.0]), None), Some(vec![3.0]));
        assert_eq!(shift(&weights, None, None), Some(vec![5.0]));
    }

    #[test]
    fn a_replaced_weight_keeps_the_base_bias() {
        let replacement = HostTensor::from_f32(DType::F32, vec![1, 1], &[7.0]);
        let mut weights = SiteWeights { replacement, ..SiteWeights::default() };
        assert_eq!(shift(&weights, Some(&[2.0]), None), Some(vec![2.0]));
        assert_eq!(shift(&weights, Some(&[2.0]), Some(&[3.0])), Some(vec![2.0]));
        assert_eq!(shift(&weights, None, None), None);
        weights.base_bias = bias(&[5.0]);
        assert_eq!(shift(&weights, Some(&[2.0]), None), Some(vec![5.0]));
    }

    #[test]
    fn dora_does_not_scale_the_base_bias() {
        // gain * (y + 2) + shift must be gain * y + 2.
        let shifted = shift(&SiteWeights::default(), Some(&[2.0]), Some(&[3.0]));
        assert_eq!(shifted, Some(vec![-4.0]));
        assert_eq!(shift(&SiteWeights::default(), None, Some(&[3.0])), None);
    }
}
