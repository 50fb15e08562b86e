//! NeMo archives: a tar of `model_config.yaml` and a torch checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::fuse::{Pair, fuse};
use super::stack::LazyTensor;
use super::{WriteError, check, inexpressible};
use crate::adapter::{Adapter, LowRank};
use crate::config::NemoQkvLayout;
use crate::geometry::ModelGeometry;
use crate::ids::LayerIdx;
use crate::modules::{SiteKey, TargetModule};
use crate::rules::listed;

mod archive;
mod checkpoint;
mod pickle;
mod rows;

use rows::Shape;

/// Writes the adapter as the NeMo archive `path`, which must end in `.nemo`.
///
/// In NeMo, query, key and value are one module, and so are gate and up. Parts with the same A share it;
/// otherwise their ranks are stacked. Absent parts become rows of zeros. Neither changes the products. For
/// rows of zeros, and to order rows by KV head, the sizes of `model` are needed.
///
/// # Errors
/// An adapter that NeMo cannot represent: with routed experts, DoRA, biases, an update of the embedding or
/// `lm_head`, full weights, several ranks or scales, or modules that differ between layers. Also a path
/// that exists or does not end in `.nemo`, and errors of the file system. No files are left behind.
pub fn nemo(
    path: &Path,
    adapter: &Adapter,
    model: Option<&ModelGeometry>,
    rows: NemoQkvLayout,
) -> Result<(), WriteError> {
    if path.extension().is_none_or(|extension| extension != "nemo") {
        return Err(inexpressible(
            &path.display(),
            "another name",
            "a file name that ends in .nemo",
            "choose a name that ends in .nemo, by which archives are found",
        ));
    }
    check::consistent(adapter)?;
    refuse_extras(adapter)?;
    let shape = Shape { model, rows };
    let mut pairs = Vec::new();
    for (layer, modules) in layers(adapter) {
        let layer = Layer { number: layer, modules };
        for slot in Slot::ALL {
            pairs.extend(layer.pair(slot, &shape)?.map(|pair| (layer.number, slot, pair)));
        }
    }
    let update = common_update(&pairs)?;
    let config = configuration(&pairs, update, model.map(|model| model.layers))?;
    let mut tensors = Vec::new();
    for (layer, slot, Pair { a, b, .. }) in pairs {
        let prefix = format!("model.layers.{layer}.{}", slot.path());
        let ([_, _, input], [_, output, _]) = (a.extents(), b.extents());
        tensors.push((format!("{prefix}.linear_in.weight"), a.dense([update.rank, input])));
        tensors.push((format!("{prefix}.linear_out.weight"), b.dense([output, update.rank])));
    }
    archive::write(path, &config, &tensors)
}

/// A module that NeMo puts LoRA on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Slot {
    Qkv,
    Dense,
    Fc1,
    Fc2,
}

impl Slot {
    const ALL: [Self; 4] = [Self::Qkv, Self::Dense, Self::Fc1, Self::Fc2];

    /// Its name in `target_modules`.
    fn name(self) -> &'static str {
        match self {
            Self::Qkv => "attention_qkv",
            Self::Dense => "attention_dense",
            Self::Fc1 => "mlp_fc1",
            Self::Fc2 => "mlp_fc2",
        }
    }

    /// Its path inside a layer.
    fn path(self) -> &'static str {
        match self {
            Self::Qkv => "self_attention.adapter_layer.lora_kqv_adapter",
            Self::Dense => "self_attention.adapter_layer.lora_dense_attention_adapter",
            Self::Fc1 => "mlp.adapter_layer.lora_hto4h_adapter",
            Self::Fc2 => "mlp.adapter_layer.lora_4htoh_adapter",
        }
    }

    /// The fused module of the slot, and its parts.
    fn modules(self) -> (TargetModule, &'static [TargetModule]) {
        use TargetModule::*;
        match self {
            Self::Qkv => (AttnQkv, &[AttnQ, AttnK, AttnV]),
            Self::Dense => (AttnDense, &[]),
            Self::Fc1 => (MlpGateUp, &[MlpHTo4h, MlpGate]),
            Self::Fc2 => (Mlp4hToH, &[]),
        }
    }
}

/// The updates of one layer.
struct Layer<'a> {
    number: u32,
    modules: BTreeMap<TargetModule, &'a LowRank>,
}

fn layers(adapter: &Adapter) -> BTreeMap<u32, BTreeMap<TargetModule, &LowRank>> {
    let mut layers: BTreeMap<u32, BTreeMap<TargetModule, &LowRank>> = BTreeMap::new();
    for (key, low) in adapter.low_ranks() {
        if let SiteKey::Layer(layer, module) = key {
            layers.entry(layer.0).or_default().insert(module, low);
        }
    }
    layers
}

impl Layer<'_> {
    fn key(&self, module: TargetModule) -> SiteKey {
        SiteKey::Layer(LayerIdx(self.number), module)
    }

    /// The update of a slot, from the fused module or from its parts; `None` if the layer has neither.
    fn pair(&self, slot: Slot, shape: &Shape<'_>) -> Result<Option<Pair>, WriteError> {
        let (whole, parts) = slot.modules();
        let present: Vec<&TargetModule> =
            parts.iter().filter(|part| self.modules.contains_key(part)).collect();
        match (self.modules.get(&whole), &present[..]) {
            (None, []) => Ok(None),
            (Some(low), []) if slot == Slot::Qkv => shape.reordered(self.key(whole), low).map(Some),
            (Some(low), []) => Ok(Some(Pair::of(low))),
            (Some(_), [part, ..]) => Err(inexpressible(
                &self.key(whole),
                format!("an update beside one of its part {part}"),
                "either the module or its parts",
                "read the adapter for its model, which cuts the module apart (--model)",
            )),
            (None, _) => {
                let lows: Vec<_> =
                    parts.iter().map(|part| self.modules.get(part).copied()).collect();
                let keys: Vec<SiteKey> = parts.iter().map(|part| self.key(*part)).collect();
                let (members, output) = shape.members(slot == Slot::Qkv, &keys, &lows)?;
                fuse(&members, 1, output)
            }
        }
    }
}

/// Refuses everything but low-rank updates of the four linear modules that NeMo adapts.
fn refuse_extras(adapter: &Adapter) -> Result<(), WriteError> {
    let refuse = |found: &str, sites: Vec<SiteKey>| {
        if sites.is_empty() {
            Ok(())
        } else {
            Err(inexpressible(
                &listed(&sites),
                found,
                "low-rank updates of query, key, value, attention output, gate, up and down \
             projections, without extras",
                "choose another format",
            ))
        }
    };
    let held = |key: &SiteKey| {
        let slot = |module: TargetModule| {
            Slot::ALL.iter().any(|slot| {
                let (whole, parts) = slot.modules();
                whole == module || parts.contains(&module)
            })
        };
        key.module().is_some_and(slot)
    };
    let sites = |wrong: &dyn Fn(&SiteKey) -> bool| {
        adapter.sites.keys().filter(|key| wrong(key)).copied().collect::<Vec<_>>()
    };
    let site = |key: &SiteKey| adapter.sites.get(key);
    let low = |key: &SiteKey| site(key)?.low_rank.as_ref();
    refuse("modules that NeMo puts no LoRA on", sites(&|key| !held(key)))?;
    let dora = sites(&|key| low(key).is_some_and(|low| low.magnitude.is_some()));
    refuse("DoRA", dora)?;
    let biased = |key: &SiteKey| low(key).is_some_and(|low| low.b_bias.is_some());
    refuse("a bias of lora_B", sites(&biased))?;
    let whole = |key: &SiteKey| {
        site(key).is_some_and(|site| site.base_bias.is_some() || site.replacement.is_some())
    };
    refuse("a whole weight or bias in place of the model's", sites(&whole))
}

/// Rank and scale of a low-rank update.
#[derive(Clone, Copy)]
struct CommonUpdate {
    rank: usize,
    scale: f32,
}

/// The rank and scale of all updates, which must be the same, as an archive states only one of each.
fn common_update(pairs: &[(u32, Slot, Pair)]) -> Result<CommonUpdate, WriteError> {
    let Some((layer, slot, first)) = pairs.first() else {
        return Err(inexpressible(
            "modules",
            "no low-rank update",
            "an adapter that changes something",
            "train it first",
        ));
    };
    let other = pairs.iter().find(|(.., pair)| {
        (pair.rank, pair.scale.to_bits()) != (first.rank, first.scale.to_bits())
    });
    let Some((other_layer, other_slot, pair)) = other else {
        return Ok(CommonUpdate { rank: first.rank, scale: first.scale });
    };
    let words = |pair: &Pair| format!("rank {} and scale {}", pair.rank, pair.scale);
    Err(inexpressible(
        &format!("layer {layer} {} and layer {other_layer} {}", slot.name(), other_slot.name()),
        format!("{} beside {}", words(first), words(pair)),
        "one rank and one scale for all modules; parts of one module that do not share A add their \
         ranks",
        "choose another format",
    ))
}

/// The text of `model_config.yaml`; `of_model` is the number of layers of the model, if it is known.
///
/// # Errors
/// Modules that are not changed in the same layers.
fn configuration(
    pairs: &[(u32, Slot, Pair)],
    update: CommonUpdate,
    of_model: Option<usize>,
) -> Result<String, WriteError> {
    let CommonUpdate { rank, scale } = update;
    let mut layers: BTreeMap<Slot, BTreeSet<u32>> = BTreeMap::new();
    for (layer, slot, _) in pairs {
        layers.entry(*slot).or_default().insert(*layer);
    }
    let mut sets = layers.iter();
    let Some((first, common)) = sets.next() else { return Ok(String::new()) };
    if let Some((slot, other)) = sets.find(|(_, set)| *set != common) {
        let numbers = |set: &BTreeSet<u32>| listed(&set.iter().collect::<Vec<_>>());
        return Err(inexpressible(
            &format!("{} and {}", first.name(), slot.name()),
            format!("layers {} beside layers {}", numbers(common), numbers(other)),
            "the same layers for all modules",
            "choose another format",
        ));
    }
    let names: Vec<&str> = layers.keys().map(|slot| slot.name()).collect();
    let mut yaml = format!(
        "peft:\n  peft_scheme: lora\n  lora_tuning:\n    target_modules: [{}]\n    \
         adapter_dim: {rank}\n    alpha: {}\n",
        names.join(", "),
        // Exact, as explained for PEFT's configuration.
        f64::from(scale) * rank as f64,
    );
    let all = of_model.is_some_and(|layers| common.iter().copied().eq(0..layers as u32));
    if !all {
        // One-based in NeMo.
        let numbers: Vec<String> = common.iter().map(|layer| (layer + 1).to_string()).collect();
        yaml += &format!("    layer_selection: [{}]\n", numbers.join(", "));
    }
    Ok(yaml)
}

/// A checkpoint's tensors, by name.
type Tensors = [(String, LazyTensor)];
