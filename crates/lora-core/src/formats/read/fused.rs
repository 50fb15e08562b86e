//! Splits fused modules (qkv, gate and up) into the modules that a model has.

use std::collections::BTreeMap;
use std::ops::Range;

use super::plan::{PlannedSites, TensorPlan};
use crate::adapter::{ModuleNaming, RowOrder, SiteWeights};
use crate::geometry::ModelGeometry;
use crate::modules::{FUSED, SiteKey, TargetModule};
use crate::rules::{Code, Rejection};

/// Splits every fused site into the modules that `model` has in its place; they share A, and each gets its
/// rows of B. A site stays fused if the model is fused there, too, or if its rows do not fit the model,
/// which the later check reports. In `naming`, the parts get the name of the fused module.
pub(crate) fn cut(
    sites: &mut PlannedSites,
    naming: &mut BTreeMap<TargetModule, ModuleNaming>,
    model: &ModelGeometry,
    problems: &mut Vec<Rejection>,
) {
    let present = model.modules();
    for (fused, parts) in FUSED {
        if present.contains(&fused) || !parts.iter().all(|part| present.contains(part)) {
            continue;
        }
        let keys: Vec<SiteKey> =
            sites.keys().filter(|key| key.module() == Some(fused)).copied().collect();
        for key in keys {
            let SiteKey::Layer(layer, _) = key else { continue };
            let Some(cut) = sites.get(&key).and_then(|site| cut_site(site, parts, model)) else {
                continue;
            };
            for (part, site) in parts.iter().zip(cut) {
                if let Some(ModuleNaming { path, .. }) = naming.get(&fused) {
                    let path = path.clone();
                    naming.insert(*part, ModuleNaming { path, mapped_exactly: true });
                }
                let part = SiteKey::Layer(layer, *part);
                if sites.insert(part, site).is_some() {
                    problems.push(both(key, part));
                }
            }
            sites.remove(&key);
        }
    }
}

/// A site for each part; `None` if the parts do not add up to the rows of the fused site.
fn cut_site(
    site: &SiteWeights<TensorPlan>,
    parts: &[TargetModule],
    model: &ModelGeometry,
) -> Option<Vec<SiteWeights<TensorPlan>>> {
    let widths: Vec<usize> =
        parts.iter().map(|part| Some(model.dims(*part)?.1)).collect::<Option<_>>()?;
    let order = site.low_rank.as_ref().map_or(RowOrder::ByPart, |low| low.rows);
    let groups = match order {
        RowOrder::ByPart => 1,
        RowOrder::ByKvHead => model.kv_heads,
    };
    if groups == 0 {
        return None;
    }
    let rows: usize = widths.iter().sum();
    let cuts = (0..parts.len()).map(|part| {
        let before: usize = widths[..part].iter().sum();
        let ranges: Vec<Range<usize>> = (0..groups)
            .map(|group| {
                let start = (group * rows + before) / groups;
                start..start + widths[part] / groups
            })
            .collect();
        take_rows(site, &ranges, rows)
    });
    cuts.collect()
}

/// The site with these ranges of its output rows; `None` if it does not have `rows` rows.
fn take_rows(
    site: &SiteWeights<TensorPlan>,
    ranges: &[Range<usize>],
    rows: usize,
) -> Option<SiteWeights<TensorPlan>> {
    let mut taken = site.clone();
    let take = |plan: &TensorPlan| plan.rows(ranges, rows);
    if let Some(low) = &mut taken.low_rank {
        low.b = take(&low.b)?;
        low.rows = RowOrder::ByPart;
        for tensor in [&mut low.magnitude, &mut low.b_bias].into_iter().flatten() {
            *tensor = take(tensor)?;
        }
    }
    for tensor in [&mut taken.base_bias, &mut taken.replacement].into_iter().flatten() {
        *tensor = take(tensor)?;
    }
    Some(taken)
}

/// Swaps the halves of `mlp_gate_up` in a file that has its up rows first.
pub(crate) fn put_gate_first(sites: &mut PlannedSites) {
    let fused = |key: &SiteKey| key.module() == Some(TargetModule::MlpGateUp);
    for (_, site) in sites.iter_mut().filter(|(key, _)| fused(key)) {
        let rows = site.low_rank.as_ref().and_then(|low| low.b.shape().first().copied());
        let Some(rows) = rows.filter(|rows| rows.is_multiple_of(2)) else { continue };
        if let Some(swapped) = take_rows(site, &[rows / 2..rows, 0..rows / 2], rows) {
            *site = swapped;
        }
    }
}

fn both(fused: SiteKey, part: SiteKey) -> Rejection {
    Rejection::new(
        Code::DuplicateTensor,
        part.to_string(),
        format!("weights of its own and as a part of {fused}"),
        "one update of a module",
        "export the adapter with either the fused module or its parts",
    )
}
