//! Putting an adapter into a slot of every site of a model.

use lora_core::lora::{LoraSite, SlotLowRank, SlotSlice};
use lora_core::{Adapter, Backend, HostTensor, LayerIdx, LowRank, SiteKey, SiteWeights};
use thiserror::Error;

use crate::model::{DenseModel, Projection};

/// Why a checked adapter could not be made resident.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// The device refused.
    #[error("{site}: {cause}")]
    Device {
        /// The site.
        site: String,
        /// Why.
        cause: lora_core::Error,
    },
}

/// Writes `adapter` into `slot` of every site, clearing what another adapter left there.
///
/// # Errors
/// [`ApplyError`] naming the site; the slot must then not be used.
pub fn apply<B: Backend>(
    be: &B,
    q: &mut B::Queue,
    model: &mut DenseModel<B>,
    slot: usize,
    adapter: &Adapter,
) -> Result<(), ApplyError> {
    let mut writer = Writer { be, q, slot, adapter };
    let base = Base { weight: &model.embed, bias: None };
    writer.write(&mut model.embed_site, &[SiteKey::Embed], &base)?;
    // Not `head()`: the site beside it is borrowed as well.
    let head = model.lm_head.as_ref().unwrap_or(&model.embed);
    writer.write(&mut model.head_site, &[SiteKey::Head], &Base { weight: head, bias: None })?;
    for (i, layer) in model.layers.iter_mut().enumerate() {
        for projection in [&mut layer.qkv, &mut layer.o, &mut layer.gate_up, &mut layer.down] {
            let Projection { weight, bias, modules, site } = projection;
            let keys: Vec<SiteKey> =
                modules.iter().map(|m| SiteKey::Layer(LayerIdx(i as u32), *m)).collect();
            writer.write(site, &keys, &Base { weight, bias: bias.as_deref() })?;
        }
    }
    Ok(())
}

/// The base layer under a site.
struct Base<'a, B: Backend> {
    weight: &'a B::Linear,
    bias: Option<&'a [f32]>,
}

struct Writer<'a, B: Backend> {
    be: &'a B,
    q: &'a mut B::Queue,
    slot: usize,
    adapter: &'a Adapter,
}

impl<B: Backend> Writer<'_, B> {
    /// Writes the slices `keys` of one site.
    fn write(
        &mut self,
        site: &mut LoraSite<B>,
        keys: &[SiteKey],
        base: &Base<'_, B>,
    ) -> Result<(), ApplyError> {
        let located = |cause| ApplyError::Device { site: format!("{keys:?}"), cause };
        let mut slices = Vec::with_capacity(keys.len());
        for (key, columns) in keys.iter().zip(site.spec.slices.clone()) {
            slices.push(match self.adapter.sites.get(key) {
                Some(weights) => Some(self.slice(weights, columns, base).map_err(located)?),
                None => None,
            });
        }
        self.be.write_slot(self.q, site, self.slot, &slices).map_err(located)
    }

    /// Turns an adapter's tensors at one module into the general form of [`LoraSite`].
    fn slice(
        &self,
        weights: &SiteWeights,
        columns: std::ops::Range<usize>,
        base: &Base<'_, B>,
    ) -> lora_core::Result<SlotSlice> {
        let low_rank = weights.low_rank.as_ref();
        let gain = match low_rank.and_then(|low| Some((low, low.magnitude.as_ref()?))) {
            Some((low, magnitude)) => {
                Some(self.dora_gain(low, magnitude, columns.clone(), base)?)
            }
            None => None,
        };
        let old_bias = base.bias.map(|bias| &bias[columns]);
        Ok(SlotSlice {
            low_rank: low_rank.map(|low| SlotLowRank {
                a: low.a.clone(),
                b: low.b.clone(),
                scale: low.scale,
            }),
            shift: shift(weights, old_bias, gain.as_deref()),
            gain,
            replacement: weights.replacement.clone(),
        })
    }

    /// `magnitude / rownorm(W + scale B A)` (Liu et al., 2024, equation 5).
    fn dora_gain(
        &self,
        low: &LowRank,
        magnitude: &HostTensor,
        columns: std::ops::Range<usize>,
        base: &Base<'_, B>,
    ) -> lora_core::Result<Vec<f32>> {
        let norms = self.be.row_norms(base.weight, columns, (&low.a, &low.b, low.scale))?;
        // A row that is zero has no direction to scale.
        if let Some(row) = norms.iter().position(|norm| *norm == 0.0 || !norm.is_finite()) {
            let what = format!("DoRA where row {row} of W + scale B A has norm {}", norms[row]);
            return Err(lora_core::Error::Unsupported { op: "dora", backend: B::NAME, what });
        }
        Ok(magnitude.iter_f32().zip(norms).map(|(m, n)| m / n).collect())
    }
}

/// The summand that turns `gain * (W x + b0 + scale B A x)` into
/// `gain * (W x + scale (B A x + b_bias)) + b1`, where `b0` is the base bias and `b1` the
/// adapter's, or the base's where it has none. `None` where it would be zero.
fn shift(
    weights: &SiteWeights,
    old_bias: Option<&[f32]>,
    gain: Option<&[f32]>,
) -> Option<Vec<f32>> {
    let b_bias = weights.low_rank.as_ref().and_then(|l| Some((l.b_bias.as_ref()?, l.scale)));
    let moves_base = gain.is_some() && old_bias.is_some();
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
        gain * (of_b - old) + new
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
    fn a_replaced_bias_takes_the_old_one_away() {
        let weights = SiteWeights { base_bias: bias(&[5.0]), ..SiteWeights::default() };
        assert_eq!(shift(&weights, Some(&[2.0]), None), Some(vec![3.0]));
        assert_eq!(shift(&weights, None, None), Some(vec![5.0]));
    }

    #[test]
    fn dora_does_not_scale_the_base_bias() {
        // gain * (y + 2) + shift must be gain * y + 2.
        let shifted = shift(&SiteWeights::default(), Some(&[2.0]), Some(&[3.0]));
        assert_eq!(shifted, Some(vec![-4.0]));
        assert_eq!(shift(&SiteWeights::default(), None, Some(&[3.0])), None);
    }
}
