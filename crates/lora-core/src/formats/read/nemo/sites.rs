//! Builds the sites of an adapter from the tensors of a NeMo file and its configuration.

use std::collections::{BTreeMap, BTreeSet};

use super::config::{CONFIG, LoraTuning};
use super::keys::{self, Half};
use crate::adapter::{LowRank, RowOrder};
use crate::config::NemoQkvLayout;
use crate::formats::read::fused;
use crate::formats::read::pair::{
    duplicate, float_view, incomplete, other_rank, rank_of, several_adapters,
};
use crate::formats::read::plan::PlannedSites;
use crate::formats::read::plan::TensorPlan;
use crate::formats::read::view::View;
use crate::formats::{RawTensor, ReadOptions};
use crate::ids::LayerIdx;
use crate::modules::{SiteKey, TargetModule};
use crate::rules::{Code, Rejection, listed};

/// The matrices of a pair, as far as the file has them.
#[derive(Default)]
struct Halves {
    a: Option<View>,
    b: Option<View>,
    /// Whether one of them is unusable, which was reported.
    broken: bool,
}

/// Plans the sites; all problems are returned together.
pub(super) fn plan(
    tensors: BTreeMap<String, RawTensor>,
    tuning: &LoraTuning,
    options: &ReadOptions,
) -> Result<PlannedSites, Vec<Rejection>> {
    let mut problems = Vec::new();
    let pairs = collect(tensors, &mut problems);
    check_targets(&pairs, tuning, options, &mut problems);
    let mut sites = PlannedSites::new();
    for (key, halves) in pairs.iter().filter(|(_, halves)| !halves.broken) {
        if let Some(low) = low_rank(halves, row_order(*key, options), tuning, &mut problems) {
            sites.insert(*key, low.into());
        }
    }
    if let Some(model) = &options.model {
        fused::cut(&mut sites, &mut BTreeMap::new(), model, &mut problems);
    }
    if problems.is_empty() { Ok(sites) } else { Err(problems) }
}

/// Assigns every tensor to a site; a tensor of unknown meaning is a rejection.
fn collect(
    tensors: BTreeMap<String, RawTensor>,
    problems: &mut Vec<Rejection>,
) -> BTreeMap<SiteKey, Halves> {
    let mut pairs: BTreeMap<SiteKey, Halves> = BTreeMap::new();
    let mut prefixes = BTreeSet::new();
    for (name, raw) in tensors {
        let Some(key) = keys::parse(&name) else {
            problems.push(unknown_tensor(&name));
            continue;
        };
        prefixes.insert(key.prefix.to_owned());
        let halves = pairs.entry(SiteKey::Layer(key.layer, key.module)).or_default();
        let Some(view) = float_view(&name, &raw, problems) else {
            halves.broken = true;
            continue;
        };
        let place = match key.half {
            Half::In => &mut halves.a,
            Half::Out => &mut halves.b,
        };
        match place {
            Some(other) => problems.push(duplicate(&name, other.name())),
            None => *place = Some(view),
        }
    }
    if prefixes.len() > 1 {
        problems.push(several_adapters("prefixes of names", prefixes));
    }
    pairs
}

/// The order of B's rows. Fused query, key and value rows are in Megatron's order unless the user says
/// otherwise. In Megatron's gated MLP the first half is the gate (`glu` in
/// `megatron/core/transformer/mlp.py`).
fn row_order(key: SiteKey, options: &ReadOptions) -> RowOrder {
    match (key.module(), options.nemo_qkv_layout) {
        (Some(TargetModule::AttnQkv), NemoQkvLayout::Interleaved) => RowOrder::ByKvHead,
        _ => RowOrder::ByPart,
    }
}

fn low_rank(
    halves: &Halves,
    rows: RowOrder,
    tuning: &LoraTuning,
    problems: &mut Vec<Rejection>,
) -> Option<LowRank<TensorPlan>> {
    let (a, b) = match (&halves.a, &halves.b) {
        (Some(a), Some(b)) => (a, b),
        (None, None) => return None,
        (Some(only), None) | (None, Some(only)) => {
            problems.push(incomplete(only, "linear_in together with linear_out"));
            return None;
        }
    };
    let rank = rank_of(a, b, problems)?;
    if let Some(stated) = tuning.rank.filter(|stated| *stated != rank) {
        problems.push(other_rank(a, stated, "adapter_dim", &format!("adapter_dim in {CONFIG}")));
    }
    let scale = tuning.alpha.map_or(1.0, |alpha| (alpha / rank as f64) as f32);
    if !scale.is_finite() {
        problems.push(Rejection::new(
            Code::InvalidConfigField,
            "alpha",
            format!("{:?}", tuning.alpha.unwrap_or_default()),
            "an alpha whose scale is a finite float32",
            format!("correct alpha in {CONFIG}"),
        ));
    }
    let (a, b) = (a.clone().into(), b.clone().into());
    Some(LowRank { rank, scale, a, b, magnitude: None, b_bias: None, rows })
}

/// Checks that exactly the layers and modules of the configuration have weights. Without a selection of
/// layers these are all layers of the model or, if it is not known, of the file.
fn check_targets(
    pairs: &BTreeMap<SiteKey, Halves>,
    tuning: &LoraTuning,
    options: &ReadOptions,
    problems: &mut Vec<Rejection>,
) {
    let Some(targets) = &tuning.targets else { return };
    let place = |key: &SiteKey| match *key {
        SiteKey::Layer(layer, module) => Some((layer, module)),
        SiteKey::Embed | SiteKey::Norm(..) | SiteKey::FinalNorm | SiteKey::Head => None,
    };
    let present: BTreeSet<(LayerIdx, TargetModule)> = pairs.keys().filter_map(place).collect();
    let stray = present.iter().filter(|(layer, module)| {
        let selected = tuning.layers.as_ref().is_none_or(|layers| layers.contains(layer));
        !selected || !targets.contains(module)
    });
    let stray: Vec<SiteKey> =
        stray.map(|(layer, module)| SiteKey::Layer(*layer, *module)).collect();
    let layers: BTreeSet<LayerIdx> = match (&tuning.layers, &options.model) {
        (Some(selected), _) => selected.clone(),
        (None, Some(model)) => (0..model.layers as u32).map(LayerIdx).collect(),
        (None, None) => present.iter().map(|(layer, _)| *layer).collect(),
    };
    let all = layers.iter().flat_map(|layer| targets.iter().map(|module| (*layer, *module)));
    let missing: Vec<SiteKey> = all
        .filter(|place| !present.contains(place))
        .map(|(layer, module)| SiteKey::Layer(layer, module))
        .collect();
    let fields = "target_modules, layer_selection";
    if !missing.is_empty() {
        problems.push(Rejection::new(
            Code::TargetWithoutWeights,
            fields,
            format!("no weights for {}", listed(&missing)),
            format!("weights for everything that {CONFIG} names"),
            format!("export the adapter again, or correct {CONFIG}"),
        ));
    }
    if !stray.is_empty() {
        problems.push(Rejection::new(
            Code::WeightsWithoutTarget,
            fields,
            format!("weights for {}", listed(&stray)),
            format!("weights for what {CONFIG} names"),
            format!("export the adapter again, or correct {CONFIG}"),
        ));
    }
}

fn unknown_tensor(name: &str) -> Rejection {
    Rejection::new(
        Code::UnknownTensor,
        name,
        "a tensor of unknown meaning",
        "linear_in.weight and linear_out.weight of lora_kqv_adapter, lora_dense_attention_adapter, \
         lora_hto4h_adapter and lora_4htoh_adapter",
        "export the LoRA adapter by itself",
    )
}
