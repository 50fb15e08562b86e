//! Putting adapters into the slots of a model's sites.

use lora_core::lora::{LoraSite, SlotLowRank, SlotRows, SlotSlice};
use lora_core::{Adapter, Backend, HostTensor, LayerIdx, LowRank, NormKind, SiteKey, SiteWeights};

use crate::adapters::{SiteWrite, WriteError};
use crate::model::{DenseModel, Layer, Norm, Projection};

/// Sites in front of those of the layers: embedding, output projection and last norm.
const WHOLE_SITES: usize = 3;

/// Projections of a layer, which come before its norms.
const PROJECTIONS: usize = 4;

/// Sites of a layer: projections, and norms whether the model has them or not.
const LAYER_SITES: usize = PROJECTIONS + NormKind::ALL.len();

/// Sites of a model.
pub fn sites<B: Backend>(model: &DenseModel<B>) -> usize {
    WHOLE_SITES + LAYER_SITES * model.layers.len()
}

/// Writes an adapter's part of one site into `slot`, or clears what another one left there.
/// Returns the bytes of that part.
///
/// # Errors
/// [`WriteError`] with the device's refusal.
pub fn write_site<B: Backend>(
    be: &B,
    q: &mut B::Queue,
    model: &mut DenseModel<B>,
    write: SiteWrite<'_>,
) -> Result<usize, WriteError> {
    let adapter = write.adapter.map(|adapter| &**adapter);
    let mut writer = Writer { be, q, slot: write.slot, adapter };
    match write.site {
        0 => {
            let base = Base { weight: &model.embed, bias: None };
            writer.write(&mut model.embed_site, &[SiteKey::Embed], &base)
        }
        1 => {
            // Not `head()`: the site beside it is borrowed as well.
            let head = model.lm_head.as_ref().unwrap_or(&model.embed);
            let base = Base { weight: head, bias: None };
            writer.write(&mut model.head_site, &[SiteKey::Head], &base)
        }
        2 => writer.write_norm(&mut model.norm, SiteKey::FinalNorm),
        of_layers => {
            let (i, part) = ((of_layers - WHOLE_SITES) / LAYER_SITES, of_layers - WHOLE_SITES);
            writer.write_layer(&mut model.layers[i], LayerIdx(i as u32), part % LAYER_SITES)
        }
    }
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
    adapter: Option<&'a Adapter>,
}

impl<B: Backend> Writer<'_, B> {
    /// Writes one site of a layer and returns its bytes.
    fn write_layer(
        &mut self,
        layer: &mut Layer<B>,
        index: LayerIdx,
        part: usize,
    ) -> Result<usize, WriteError> {
        if let Some(kind) = part.checked_sub(PROJECTIONS).map(|norm| NormKind::ALL[norm]) {
            let norm = match (kind, &mut layer.qk_norms) {
                (NormKind::Input, _) => &mut layer.input_norm,
                (NormKind::PostAttention, _) => &mut layer.post_norm,
                (NormKind::Query, Some((query, _))) => query,
                (NormKind::Key, Some((_, key))) => key,
                (NormKind::Query | NormKind::Key, None) => return Ok(0),
            };
            return self.write_norm(norm, SiteKey::Norm(index, kind));
        }
        let parts: [_; PROJECTIONS] =
            [&mut layer.qkv, &mut layer.o, &mut layer.gate_up, &mut layer.down];
        let mut parts = parts.into_iter();
        let Some(Projection { weight, bias, modules, site }) = parts.nth(part) else {
            return Ok(0);
        };
        let key = |module: &_| SiteKey::Layer(index, *module);
        let keys: Vec<SiteKey> = modules.iter().map(key).collect();
        self.write(site, &keys, &Base { weight, bias: bias.as_deref() })
    }

    /// Writes the weight of a norm and returns its bytes.
    fn write_norm(&mut self, norm: &mut Norm<B>, key: SiteKey) -> Result<usize, WriteError> {
        let site = self.adapter.and_then(|adapter| adapter.sites.get(&key));
        let weight = site.and_then(|site| site.replacement.as_ref());
        norm.write(self.be, self.q, self.slot, weight)
            .map_err(|cause| WriteError { site: key.to_string(), cause })?;
        Ok(weight.map_or(0, |weight| weight.bytes().len()))
    }

    /// Writes the slices `keys` of one site and returns their bytes.
    fn write(
        &mut self,
        site: &mut LoraSite<B>,
        keys: &[SiteKey],
        base: &Base<'_, B>,
    ) -> Result<usize, WriteError> {
        let located = |cause| WriteError { site: format!("{keys:?}"), cause };
        let mut slices = Vec::with_capacity(keys.len());
        let mut bytes = 0;
        for (key, columns) in keys.iter().zip(site.spec.slices.clone()) {
            slices.push(match self.adapter.and_then(|adapter| adapter.sites.get(key)) {
                Some(weights) => {
                    bytes += weights.tensors().map(|t| t.bytes().len()).sum::<usize>();
                    Some(self.slice((*key, weights), columns, base).map_err(located)?)
                }
                None => None,
            });
        }
        self.be.write_slot(self.q, site, self.slot, &slices).map_err(located)?;
        Ok(bytes)
    }

    /// Turns an adapter's tensors at one module into the general form of [`LoraSite`].
    fn slice(
        &self,
        (key, weights): (SiteKey, &SiteWeights),
        columns: std::ops::Range<usize>,
        base: &Base<'_, B>,
    ) -> lora_core::Result<SlotSlice> {
        let low_rank = weights.low_rank.as_ref();
        let gain = match low_rank.and_then(|low| Some((low, low.magnitude.as_ref()?))) {
            Some((low, magnitude)) => {
                let norms = self.dora_norms(key, low, columns.clone(), base)?;
                Some(dora_gain::<B>(magnitude, &norms)?)
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
            rows: weights
                .rows
                .as_ref()
                .map(|rows| SlotRows { ids: rows.ids.clone(), values: rows.values.clone() }),
        })
    }

    /// `rownorm(W + scale B A)`, where W is the base model's weight unless the adapter came with norms of
    /// its own.
    fn dora_norms(
        &self,
        key: SiteKey,
        low: &LowRank,
        columns: std::ops::Range<usize>,
        base: &Base<'_, B>,
    ) -> lora_core::Result<Vec<f32>> {
        match self.adapter.and_then(|adapter| adapter.norms.get(&key)) {
            Some(norms) => Ok(norms.clone()),
            None => self.be.row_norms(base.weight, columns, (&low.a, &low.b, low.scale)),
        }
    }
}

/// `magnitude / rownorm(W + scale B A)` (Liu et al., 2024, equation 5).
fn dora_gain<B: Backend>(magnitude: &HostTensor, norms: &[f32]) -> lora_core::Result<Vec<f32>> {
    // A row that is zero has no direction to scale.
    if let Some(row) = norms.iter().position(|norm| *norm == 0.0 || !norm.is_finite()) {
        let what = format!("DoRA where row {row} of W + scale B A has norm {}", norms[row]);
        return Err(lora_core::Error::Unsupported { op: "dora", backend: B::NAME, what });
    }
    Ok(magnitude.iter_f32().zip(norms).map(|(m, n)| m / n).collect())
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
