//! Writes `adapter_config.json` for the tensors of a PEFT directory.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::contents::{Contents, SiteUpdate, Target};
use super::names::Names;
use super::{WriteError, inexpressible};
use crate::adapter::{Adapter, Declaration, Selector, SiteWeights};
use crate::config::ExpertLayout;
use crate::modules::{SiteKey, TargetModule};

/// The PEFT release whose names and layouts are written.
const RELEASE: &str = "0.21.2";

/// A release that swaps the roles of A and B in `target_parameters`, for the layout that does so.
const SWAPPING_RELEASE: &str = "0.18.1";

/// The configuration.
///
/// # Errors
/// Extras on only some modules, as PEFT enables them for all modules or none.
pub(super) fn config(
    adapter: &Adapter,
    layout: ExpertLayout,
    names: &Names,
    contents: &Contents,
) -> Result<Value, WriteError> {
    let swapped = layout == ExpertLayout::TargetParametersSwapped;
    let mut config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "peft_version": if swapped { SWAPPING_RELEASE } else { RELEASE },
        "base_model_name_or_path": adapter.source.base_model_name,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_dropout": 0.0,
        "fan_in_fan_out": false,
        "use_dora": variant(adapter, Extra::Magnitude)?,
        "bias": biases(adapter)?,
    });
    let Some(fields) = config.as_object_mut() else { return Ok(config) };
    // Newer fields are left out if they are not needed, so that older releases can read the file.
    if variant(adapter, Extra::OutputBias)? {
        fields.insert("lora_bias".to_owned(), true.into());
    }
    if adapter.declaration.as_ref().is_some_and(|declared| declared.ensure_weight_tying) {
        fields.insert("ensure_weight_tying".to_owned(), true.into());
    }
    fields.extend(whole_weights(adapter, names));
    fields.extend(scales(&contents.updates));
    match reusable(adapter, layout, names) {
        Some(declared) => fields.extend(as_declared(declared)),
        None => fields.extend(selection(names, contents)),
    }
    Ok(config)
}

/// `modules_to_save` and `trainable_token_indices`.
fn whole_weights(adapter: &Adapter, names: &Names) -> Map<String, Value> {
    // These short names match the embedding and `lm_head` in every model.
    let name = |key: SiteKey| match key {
        SiteKey::Embed | SiteKey::Head => key.to_string(),
        _ => names.module(key),
    };
    let sites = || adapter.sites.iter().map(|(key, site)| (*key, site));
    let saved = sites().filter(|(_, site)| is_saved(site)).map(|(key, _)| name(key));
    let saved: Vec<String> = saved.collect();
    let tokens = sites().filter_map(|(key, site)| Some((name(key), site.rows.as_ref()?)));
    let tokens: Map<String, Value> = tokens.map(|(name, rows)| (name, json!(rows.ids))).collect();
    let mut fields = Map::new();
    if !saved.is_empty() {
        fields.insert("modules_to_save".to_owned(), saved.into());
    }
    if !tokens.is_empty() {
        fields.insert("trainable_token_indices".to_owned(), tokens.into());
    }
    fields
}

/// Whether a site's full weight belongs in `modules_to_save`. If the site also has a low-rank update, PEFT
/// saves the weight as that of the base layer instead.
pub(super) fn is_saved(site: &SiteWeights) -> bool {
    site.replacement.is_some() && site.low_rank.is_none()
}

/// An extra of a low-rank update, beside A and B.
#[derive(Clone, Copy)]
enum Extra {
    Magnitude,
    OutputBias,
}

/// Whether the updates have an extra, which must be true of all of them or of none.
fn variant(adapter: &Adapter, extra: Extra) -> Result<bool, WriteError> {
    let (field, other) = match extra {
        Extra::Magnitude => ("use_dora", Extra::OutputBias),
        Extra::OutputBias => ("lora_bias", Extra::Magnitude),
    };
    let has = |extra: Extra| {
        adapter.low_ranks().find(move |(_, low)| match extra {
            Extra::Magnitude => low.magnitude.is_some(),
            Extra::OutputBias => low.b_bias.is_some(),
        })
    };
    let Some((with, _)) = has(extra) else { return Ok(false) };
    let refuse = |found: String| {
        let allowed = format!("what {field} says of all updates alike, and of dense modules only");
        inexpressible(&field, found, allowed, "train the adapter with one setting for all modules")
    };
    if let Some((beside, _)) = has(other) {
        return Err(refuse(format!("DoRA and a bias of lora_B, on {with} and {beside}")));
    }
    let without = adapter.low_ranks().find(|(key, low)| {
        let present = match extra {
            Extra::Magnitude => low.magnitude.is_some(),
            Extra::OutputBias => low.b_bias.is_some(),
        };
        let biased = *key == SiteKey::Embed && field == "lora_bias";
        !present || biased || routed(*key)
    });
    match without {
        Some((without, _)) => {
            Err(refuse(format!("it on {with} and a low-rank update of {without}")))
        }
        None => Ok(true),
    }
}

fn routed(key: SiteKey) -> bool {
    key.module().is_some_and(TargetModule::is_routed_expert)
}

/// The value of `bias`, which declares the base biases of the file.
fn biases(adapter: &Adapter) -> Result<&'static str, WriteError> {
    let with = || adapter.sites.iter().filter(|(_, site)| site.base_bias.is_some());
    let modules: BTreeSet<TargetModule> = with().filter_map(|(key, _)| key.module()).collect();
    let without = adapter.sites.iter().find(|(key, site)| {
        site.base_bias.is_none() && key.module().is_some_and(|module| modules.contains(&module))
    });
    if let Some((key, _)) = without {
        return Err(inexpressible(
            &key,
            "no bias, though other layers have one",
            "a bias in every layer or in none",
            "export the adapter again",
        ));
    }
    Ok(match with().next() {
        None => "none",
        Some(_) if with().all(|(_, site)| site.low_rank.is_some()) => "lora_only",
        Some(_) => "all",
    })
}

/// `r` and `lora_alpha` for the most frequent rank and scale, and patterns for the other modules.
///
/// Without `use_rslora`, a scale is alpha / rank. As a scale is an f32 and a rank is a small integer,
/// alpha = scale * rank is exact in f64, and alpha / rank gives exactly the scale.
fn scales(updates: &[SiteUpdate]) -> Map<String, Value> {
    let mut counts: BTreeMap<(usize, u32), usize> = BTreeMap::new();
    for update in updates {
        *counts.entry((update.rank, update.scale.to_bits())).or_default() += 1;
    }
    let commonest = counts.iter().max_by_key(|(_, count)| **count).map(|(common, _)| *common);
    let (rank, scale) = commonest.unwrap_or((1, 1.0f32.to_bits()));
    let alpha = alpha(rank, f32::from_bits(scale));
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for update in updates {
        let own = self::alpha(update.rank, update.scale);
        if update.rank != rank {
            ranks.insert(update.key.clone(), update.rank.into());
        }
        if own != alpha {
            alphas.insert(update.key.clone(), number(own));
        }
    }
    Map::from_iter([
        ("r".to_owned(), rank.into()),
        ("lora_alpha".to_owned(), number(alpha)),
        ("use_rslora".to_owned(), false.into()),
        ("rank_pattern".to_owned(), ranks.into()),
        ("alpha_pattern".to_owned(), alphas.into()),
    ])
}

fn alpha(rank: usize, scale: f32) -> f64 {
    f64::from(scale) * rank as f64
}

/// A number; integers without a decimal point, as PEFT writes them.
fn number(value: f64) -> Value {
    let whole = value as i64;
    if whole as f64 == value { whole.into() } else { value.into() }
}

/// The declaration of the file that the adapter was read from, if it also describes the new file: that is,
/// if module names do not change and routed experts have a layout of the same family.
fn reusable<'a>(
    adapter: &'a Adapter,
    layout: ExpertLayout,
    names: &Names,
) -> Option<&'a Declaration> {
    let declared = adapter.declaration.as_ref()?;
    let experts = adapter.sites.keys().any(|key| routed(*key));
    let family = |layout: ExpertLayout| {
        use ExpertLayout::*;
        match layout {
            PerExpert => 0,
            Stacked | SharedOuter => 1,
            Fused | FusedInterleaved => 2,
            TargetParameters
            | TargetParametersSwapped
            | TargetParametersInterleaved
            | UnslothExpertSlowest => 3,
        }
    };
    let alike = !experts || adapter.source.expert_layout.map(family) == Some(family(layout));
    (alike && !names.renamed).then_some(declared)
}

fn as_declared(declared: &Declaration) -> Map<String, Value> {
    let selector = |selector: &Selector| match selector {
        Selector::Names(names) => json!(names),
        Selector::Pattern(pattern) => json!(pattern),
        Selector::AllLinear => json!("all-linear"),
    };
    let mut fields = Map::from_iter([("target_modules".to_owned(), selector(&declared.targets))]);
    if !declared.parameters.is_empty() {
        fields.insert("target_parameters".to_owned(), json!(declared.parameters));
    }
    if let Some(exclude) = &declared.exclude {
        fields.insert("exclude_modules".to_owned(), selector(exclude));
    }
    if let Some(filter) = &declared.layers {
        fields.insert("layers_to_transform".to_owned(), json!(filter.layers));
        if !filter.patterns.is_empty() {
            fields.insert("layers_pattern".to_owned(), json!(filter.patterns));
        }
    }
    fields
}

/// Fields that target exactly the modules and parameters of the file.
fn selection(names: &Names, contents: &Contents) -> Map<String, Value> {
    let mut fields = target_modules(names, &contents.targets);
    if !contents.parameters.is_empty() {
        let parameters = target_parameters(names, &contents.parameters);
        fields.insert("target_parameters".to_owned(), parameters);
    }
    fields
}

fn target_modules(names: &Names, targets: &[Target]) -> Map<String, Value> {
    let mut layers: BTreeMap<&str, BTreeSet<u32>> = BTreeMap::new();
    let mut whole = Vec::new();
    for target in targets {
        match target.layer {
            Some(layer) => drop(layers.entry(&target.path).or_default().insert(layer)),
            None => whole.push(target.path.clone()),
        }
    }
    let mut sets = layers.values();
    let first = sets.next().cloned().unwrap_or_default();
    // `layers_pattern` matches only after a root. Without a pattern, PEFT might take the number of an expert
    // for that of the layer.
    let alike = sets.all(|set| *set == first) && !names.root().is_empty() && !first.is_empty();
    if !alike {
        let full = targets.iter().map(|target| match target.layer {
            Some(layer) => names.in_layer(layer, &target.path),
            None => target.path.clone(),
        });
        let full: Vec<String> = full.collect();
        return Map::from_iter([("target_modules".to_owned(), full.into())]);
    }
    let paths = layers.keys().map(|path| (*path).to_owned()).chain(whole);
    Map::from_iter([
        ("target_modules".to_owned(), paths.collect::<Vec<_>>().into()),
        ("layers_to_transform".to_owned(), json!(first)),
        ("layers_pattern".to_owned(), "layers".into()),
    ])
}

/// Names of the parameters: without layers if all layers have the same ones, else full names, as
/// `layers_to_transform` does not apply to parameters.
fn target_parameters(names: &Names, parameters: &[(u32, &'static str)]) -> Value {
    let mut layers: BTreeMap<&str, BTreeSet<u32>> = BTreeMap::new();
    for (layer, path) in parameters {
        layers.entry(path).or_default().insert(*layer);
    }
    let all = |set: &BTreeSet<u32>| set.iter().copied().eq(0..set.len() as u32);
    let mut sets = layers.values();
    let first = sets.next().cloned().unwrap_or_default();
    if all(&first) && sets.all(|set| *set == first) {
        // PEFT wraps them in this order.
        let mut paths: Vec<&str> = parameters.iter().map(|(_, path)| *path).collect();
        paths.truncate(layers.len());
        return json!(paths);
    }
    let full = parameters.iter().map(|(layer, path)| names.in_layer(*layer, path));
    json!(full.collect::<Vec<_>>())
}
