//! Compares the effect of two adapters, regardless of their file formats.

use std::collections::BTreeSet;
use std::fmt;

use rayon::prelude::*;
use serde::Serialize;

use self::delta::{Dims, Matrices, Measured, measure};
use super::{Adapter, LowRank, SiteWeights};
use crate::device::HostTensor;
use crate::modules::{FUSED, SiteKey};

mod delta;

/// The comparison of two adapters at a site, or at one routed expert of a site.
#[derive(Clone, PartialEq, Debug)]
pub struct SiteDiff {
    /// The site.
    pub site: SiteKey,
    /// The expert, if the site is a stack of routed experts.
    pub expert: Option<usize>,
    /// The difference of the low-rank updates.
    pub delta: DeltaDiff,
    /// Other tensors that differ.
    pub unequal: Vec<Addition>,
}

/// The comparison of two low-rank updates `scale * B A`.
#[derive(Clone, PartialEq, Debug)]
pub enum DeltaDiff {
    /// Bitwise equal, or both absent.
    Identical,
    /// Both were multiplied out in f64, from the exact values of their elements. An absent one is zero.
    Measured {
        /// The largest absolute difference of two elements.
        difference: f64,
        /// The largest absolute value of an element of either.
        largest: f64,
    },
    /// They cannot be compared; the text says why, and what to do.
    Incomparable(String),
}

impl From<Option<Measured>> for DeltaDiff {
    fn from(measured: Option<Measured>) -> Self {
        match measured {
            Some(Measured { difference, largest }) => Self::Measured { difference, largest },
            None => Self::Identical,
        }
    }
}

/// A tensor of a site other than A and B.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Addition {
    /// DoRA's magnitude.
    Magnitude,
    /// The bias of B, times the scale.
    OutputBias,
    /// The bias that replaces the base layer's.
    BaseBias,
    /// The weight that replaces the base layer's.
    Replacement,
    /// Rows of tokens that replace the base layer's.
    TokenRows,
}

impl fmt::Display for Addition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Magnitude => "DoRA magnitude",
            Self::OutputBias => "bias of lora_B",
            Self::BaseBias => "bias of the base layer",
            Self::Replacement => "weight of the base layer",
            Self::TokenRows => "trained rows of tokens",
        })
    }
}

impl SiteDiff {
    /// Whether the adapters agree here: no element of the updates differs by more than `tolerance` times the
    /// largest element, and all other tensors are equal.
    pub fn is_same(&self, tolerance: f64) -> bool {
        let delta = match self.delta {
            DeltaDiff::Identical => true,
            DeltaDiff::Measured { difference, largest } => difference <= tolerance * largest,
            DeltaDiff::Incomparable(_) => false,
        };
        delta && self.unequal.is_empty()
    }
}

/// Compares two adapters at every site that either of them changes, and at every routed expert.
///
/// A missing low-rank update counts as zero. Tensors are compared by value, whatever their dtypes. Runs on
/// the current rayon pool. Besides the adapters, it needs memory for A in f32 and a few rows for each
/// thread.
pub fn diff(ours: &Adapter, theirs: &Adapter) -> Vec<SiteDiff> {
    let keys: BTreeSet<SiteKey> = ours.sites.keys().chain(theirs.sites.keys()).copied().collect();
    let none = SiteWeights::default();
    let diffs = keys.into_par_iter().flat_map_iter(|key| {
        let [one, two] = [ours, theirs].map(|adapter| adapter.sites.get(&key).unwrap_or(&none));
        let entangled = entangled(key, ours, theirs).or_else(|| entangled(key, theirs, ours));
        match entangled.or_else(|| incomparable(key, one, two)) {
            Some(reason) => vec![SiteDiff {
                site: key,
                expert: None,
                delta: DeltaDiff::Incomparable(reason),
                unequal: unequal(one, two),
            }],
            None => site_diffs(key, one, two),
        }
    });
    diffs.collect()
}

/// Why a site has no counterpart in the other adapter: one of them has the fused module, the other its parts.
fn entangled(key: SiteKey, one: &Adapter, other: &Adapter) -> Option<String> {
    let SiteKey::Layer(layer, module) = key else { return None };
    let has =
        |adapter: &Adapter, module| adapter.sites.contains_key(&SiteKey::Layer(layer, module));
    for (fused, parts) in FUSED {
        let whole = module == fused && !has(other, fused) && parts.iter().any(|p| has(other, *p));
        let part = parts.contains(&module) && !has(other, module) && has(other, fused);
        if has(one, module) && (whole || part) {
            return Some(format!(
                "one adapter has {fused}, the other its parts; read both for a model (--model), \
                 which cuts it apart"
            ));
        }
    }
    None
}

/// Why two updates cannot be compared, if so.
fn incomparable(key: SiteKey, one: &SiteWeights, two: &SiteWeights) -> Option<String> {
    let pairs = [one, two].map(|site| site.low_rank.as_ref());
    for low in pairs.into_iter().flatten() {
        if Dims::of(low).is_none() {
            let (a, b) = (low.a.shape(), low.b.shape());
            return Some(format!("A {a:?} and B {b:?} of {key} are no pair of rank {}", low.rank));
        }
    }
    let [Some(one), Some(two)] = pairs else { return None };
    if one.rows != two.rows {
        return Some(format!(
            "the rows of {key} are ordered part by part in one adapter, by KV head in the other; \
             read both for a model (--model), which cuts them apart"
        ));
    }
    let (ours, theirs) = (Dims::of(one)?, Dims::of(two)?);
    let experts = |other: &Dims, own: &Dims| [1, own.experts].contains(&other.experts);
    let fits = experts(&ours, &theirs) || experts(&theirs, &ours);
    if !fits || (ours.input, ours.output) != (theirs.input, theirs.output) {
        let words = |dims: &Dims| {
            if dims.stacked {
                format!("{} experts of {} x {}", dims.experts, dims.output, dims.input)
            } else {
                format!("{} x {}", dims.output, dims.input)
            }
        };
        return Some(format!(
            "{} beside {}; the adapters are not for the same model",
            words(&ours),
            words(&theirs)
        ));
    }
    None
}

/// Compares a site whose updates have the same dimensions.
fn site_diffs(key: SiteKey, one: &SiteWeights, two: &SiteWeights) -> Vec<SiteDiff> {
    let pairs = [one, two].map(|site| site.low_rank.as_ref());
    let unequal = unequal(one, two);
    let dims = pairs.into_iter().flatten().filter_map(Dims::of).max_by_key(|dims| dims.experts);
    let Some(dims) = dims else {
        return vec![SiteDiff { site: key, expert: None, delta: DeltaDiff::Identical, unequal }];
    };
    let experts = (0..dims.experts).map(|expert| {
        let [one, two] = pairs.map(|low| low.map(|low| Matrices::of(low, expert, dims)));
        SiteDiff {
            site: key,
            expert: dims.stacked.then_some(expert),
            delta: measure(one.as_ref(), two.as_ref(), dims).into(),
            unequal: unequal.clone(),
        }
    });
    experts.collect()
}

/// The other tensors that differ.
fn unequal(one: &SiteWeights, two: &SiteWeights) -> Vec<Addition> {
    fn low(site: &SiteWeights) -> Option<&LowRank> {
        site.low_rank.as_ref()
    }
    let magnitude = |site| low(site).and_then(|low| low.magnitude.as_ref());
    let scaled = |site| {
        let low = low(site)?;
        let bias = low.b_bias.as_ref()?.iter_f32().map(|value| value * low.scale);
        Some(bias.collect::<Vec<f32>>())
    };
    let same = |one: Option<&HostTensor>, two: Option<&HostTensor>| match (one, two) {
        (Some(one), Some(two)) => {
            one == two || (one.shape() == two.shape() && one.iter_f32().eq(two.iter_f32()))
        }
        (None, None) => true,
        _ => false,
    };
    let pairs = [
        (Addition::Magnitude, same(magnitude(one), magnitude(two))),
        (Addition::OutputBias, scaled(one) == scaled(two)),
        (Addition::BaseBias, same(one.base_bias.as_ref(), two.base_bias.as_ref())),
        (Addition::Replacement, same(one.replacement.as_ref(), two.replacement.as_ref())),
        (Addition::TokenRows, same_rows(one, two)),
    ];
    pairs.into_iter().filter(|(_, same)| !same).map(|(addition, _)| addition).collect()
}

/// Whether the same tokens have the same rows.
fn same_rows(one: &SiteWeights, two: &SiteWeights) -> bool {
    match (&one.rows, &two.rows) {
        (Some(one), Some(two)) => {
            one.ids == two.ids && one.values.iter_f32().eq(two.values.iter_f32())
        }
        (None, None) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::adapter::{AdapterInfo, RowOrder};
    use crate::device::DType;
    use crate::ids::LayerIdx;
    use crate::modules::TargetModule;

    fn tensor(dtype: DType, shape: &[usize], first: f32) -> HostTensor {
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|i| first + i as f32).collect();
        HostTensor::from_f32(dtype, shape.to_vec(), &values).unwrap()
    }

    fn low(a: HostTensor, b: HostTensor, scale: f32) -> SiteWeights {
        let rank = *b.shape().last().unwrap();
        let rows = RowOrder::ByPart;
        LowRank { rank, scale, a, b, magnitude: None, b_bias: None, rows }.into()
    }

    fn adapter(module: TargetModule, site: SiteWeights) -> Adapter {
        let sites = BTreeMap::from([(SiteKey::Layer(LayerIdx(0), module), site)]);
        Adapter::new(sites, AdapterInfo::default(), None)
    }

    fn simple(dtype: DType, scale: f32) -> SiteWeights {
        low(tensor(dtype, &[1, 2], 1.0), tensor(dtype, &[3, 1], 1.0), scale)
    }

    #[test]
    fn the_largest_difference_and_the_largest_element_are_found() {
        // B A is [1 2; 2 4; 3 6].
        let one = adapter(TargetModule::AttnQ, simple(DType::F32, 1.0));
        let half = adapter(TargetModule::AttnQ, simple(DType::Bf16, 0.5));
        let found = diff(&one, &half);
        let measured = DeltaDiff::Measured { difference: 3.0, largest: 6.0 };
        assert_eq!((found.len(), &found[0].delta), (1, &measured));
        assert!(found[0].is_same(0.5) && !found[0].is_same(0.49));
        let absent = Adapter::new(BTreeMap::new(), AdapterInfo::default(), None);
        let found = diff(&absent, &one);
        assert_eq!(found[0].delta, DeltaDiff::Measured { difference: 6.0, largest: 6.0 });
    }

    #[test]
    fn equal_values_are_the_same_in_any_type_and_layout() {
        let one = adapter(TargetModule::AttnQ, simple(DType::F32, 1.0));
        assert_eq!(diff(&one, &one)[0].delta, DeltaDiff::Identical);
        let other = adapter(TargetModule::AttnQ, simple(DType::F16, 1.0));
        assert!(diff(&one, &other)[0].is_same(0.0));
        let b = || tensor(DType::F32, &[2, 3, 1], 1.0);
        let shared =
            adapter(TargetModule::MoeGate, low(tensor(DType::F32, &[1, 1, 2], 1.0), b(), 1.0));
        let values = [1.0, 2.0, 1.0, 2.0];
        let a = HostTensor::from_f32(DType::F32, vec![2, 1, 2], &values).unwrap();
        let expanded = adapter(TargetModule::MoeGate, low(a, b(), 1.0));
        let found = diff(&shared, &expanded);
        assert_eq!(found.iter().map(|d| d.expert).collect::<Vec<_>>(), [Some(0), Some(1)]);
        assert!(found.iter().all(|d| d.is_same(0.0)));
    }

    #[test]
    fn what_is_beside_the_update_counts() {
        let plain = adapter(TargetModule::AttnQ, simple(DType::F32, 1.0));
        let mut site = simple(DType::F32, 1.0);
        site.base_bias = Some(tensor(DType::F32, &[3], 0.0));
        if let Some(low) = &mut site.low_rank {
            low.magnitude = Some(tensor(DType::F32, &[3], 0.0));
        }
        let found = diff(&plain, &adapter(TargetModule::AttnQ, site));
        assert_eq!(found[0].unequal, [Addition::Magnitude, Addition::BaseBias]);
        assert!(!found[0].is_same(1.0));
    }

    #[test]
    fn what_cannot_be_compared_is_told_and_never_panics() {
        let q = adapter(TargetModule::AttnQ, simple(DType::F32, 1.0));
        let (a, b) = (tensor(DType::F32, &[1, 3], 1.0), tensor(DType::F32, &[3, 1], 1.0));
        let wider = adapter(TargetModule::AttnQ, low(a, b, 1.0));
        let (a, b) = (tensor(DType::F32, &[2], 1.0), tensor(DType::F32, &[3, 1], 1.0));
        let odd = adapter(TargetModule::AttnQ, low(a, b, 1.0));
        let fused = adapter(TargetModule::AttnQkv, simple(DType::F32, 1.0));
        let mut by_head = simple(DType::F32, 1.0);
        if let Some(low) = &mut by_head.low_rank {
            low.rows = RowOrder::ByKvHead;
        }
        let by_head = adapter(TargetModule::AttnQkv, by_head);
        for (one, two, words) in [
            (&q, &wider, "3 x 2 beside 3 x 3"),
            (&q, &odd, "no pair"),
            (&q, &fused, "--model"),
            (&fused, &by_head, "by KV head"),
        ] {
            for found in [diff(one, two), diff(two, one)].concat() {
                let DeltaDiff::Incomparable(reason) = &found.delta else { panic!("{found:?}") };
                let reversed = words.contains("beside") && reason.contains("3 x 3 beside 3 x 2");
                assert!(reason.contains(words) || reversed, "{reason}");
            }
        }
    }
}
