//! Compares the targets of the configuration with the tensors of the file.
//!
//! A target without tensors is a warning only, as configurations often target more than was trained. Tensors
//! without a target would be dropped by PEFT without notice, so they are refused.

use std::collections::{BTreeMap, BTreeSet};

use super::experts;
use crate::adapter::targets::{TargetMatcher, ends_with_name};
use crate::adapter::{Adapter, Declaration, Selector};
use crate::geometry::ModelGeometry;
use crate::ids::LayerIdx;
use crate::modules::{ModuleMap, SiteKey, TargetModule};
use crate::rules::{Code, Rejection, listed};

/// Differences between targets and tensors.
#[derive(Default)]
pub(super) struct Differences {
    /// Whether PEFT trains `lm_head` along with the embedding, although it is not targeted.
    kept_tied: bool,
    /// Targets without tensors, with their names in PEFT.
    missing: BTreeMap<SiteKey, String>,
    /// Entries of `target_modules` that match no module of the model.
    unknown: Vec<String>,
    /// Tensors without a target.
    stray: Vec<SiteKey>,
    /// Tensors of the embedding and `lm_head` beside `all-linear`, which targets neither.
    beside_all_linear: Vec<SiteKey>,
}

impl Differences {
    /// Finds the differences of an adapter on a model.
    ///
    /// # Errors
    /// Invalid patterns, and patterns that take too long to match.
    pub(super) fn find(
        adapter: &Adapter,
        declaration: &Declaration,
        model: &ModelGeometry,
    ) -> Result<Self, Vec<Rejection>> {
        let matcher = TargetMatcher::new(declaration)?;
        let present: BTreeSet<SiteKey> = adapter.low_ranks().map(|(key, _)| key).collect();
        let names = model_names(declaration, model, &present);
        let kept_tied = model.tied_embeddings && declaration.ensure_weight_tying;
        let mut found =
            Self { kept_tied, unknown: unknown(declaration, model, &names), ..Self::default() };
        for (key, name) in names {
            let sorted = found.sort(&matcher, declaration, key, name, present.contains(&key));
            sorted.map_err(|problem| vec![problem])?;
        }
        Ok(found)
    }

    /// Adds a site to the differences, if it is one.
    fn sort(
        &mut self,
        matcher: &TargetMatcher<'_>,
        declaration: &Declaration,
        key: SiteKey,
        name: String,
        is_present: bool,
    ) -> Result<(), Rejection> {
        let parameter = match key.module() {
            Some(module) if module.is_routed_expert() => declaration.targets_parameter(&name),
            Some(TargetModule::MoeRouter) => declaration.trained(&name) != name,
            _ => false,
        };
        let is_targeted = parameter || matcher.targets(&name)?;
        let is_end = matches!(key, SiteKey::Embed | SiteKey::Head);
        if is_targeted && !is_present {
            self.missing.insert(key, name);
        } else if is_present && !is_targeted && !(self.kept_tied && key == SiteKey::Head) {
            let all_linear = is_end && declaration.targets == Selector::AllLinear;
            if all_linear && !matcher.leaves_out(&name)? {
                self.beside_all_linear.push(key)
            } else {
                self.stray.push(key)
            }
        }
        Ok(())
    }

    /// The tensors that PEFT would drop.
    pub(super) fn rejection(&self) -> Option<Rejection> {
        (!self.stray.is_empty()).then(|| {
            Rejection::new(
                Code::WeightsWithoutTarget,
                "target_modules",
                format!("weights for {}", listed(&self.stray)),
                "weights only for modules that the configuration targets",
                "export the adapter again, or correct its adapter_config.json",
            )
        })
    }

    /// Differences that do not prevent serving; `layers` is the number of layers of the model.
    pub(super) fn warnings(&self, layers: usize) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.missing.is_empty() {
            let missing = self.missing_modules(layers).join(", ");
            warnings.push(format!(
                "target_modules: no weights for {missing}, which stay as they are in the base model"
            ));
        }
        if !self.unknown.is_empty() {
            let unknown = self.unknown.iter().map(|name| format!("`{name}`"));
            let unknown = listed(&unknown.collect::<Vec<_>>());
            warnings.push(format!("target_modules: the model has no {unknown}"));
        }
        if !self.beside_all_linear.is_empty() {
            let sites = listed(&self.beside_all_linear);
            warnings.push(format!(
                "target_modules: all-linear does not mean {sites}, but the file has weights for it, \
                 which are applied; PEFT would leave them out"
            ));
        }
        warnings
    }

    /// The targets without tensors, grouped by module: `mlp.up_proj`, or `mlp.up_proj of layers 0, 2` if
    /// other layers have tensors.
    fn missing_modules(&self, layers: usize) -> Vec<String> {
        let mut modules: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
        for (key, name) in &self.missing {
            let number = key.layer().map(|layer| layer.0);
            let start = number.and_then(|number| {
                let start = format!("layers.{number}.");
                Some(name.find(&start)? + start.len())
            });
            modules.entry(&name[start.unwrap_or(0)..]).or_default().extend(number);
        }
        let text = |(path, of): (&str, Vec<u32>)| match of.len() {
            0 => path.to_owned(),
            count if count == layers => path.to_owned(),
            _ => format!("{path} of layers {}", listed(&of)),
        };
        modules.into_iter().map(text).collect()
    }
}

/// Entries of `target_modules` that match no module. Empty for models with routed experts, not all of whose
/// modules are known here.
fn unknown(
    declaration: &Declaration,
    model: &ModelGeometry,
    names: &BTreeMap<SiteKey, String>,
) -> Vec<String> {
    let Selector::Names(targets) = &declaration.targets else { return Vec::new() };
    if model.num_experts > 0 {
        return Vec::new();
    }
    let idle = |target: &&String| !names.values().any(|name| ends_with_name(name, target));
    targets.iter().filter(idle).cloned().collect()
}

/// Every site of the model that can have a low-rank update, with its name in PEFT.
fn model_names(
    declaration: &Declaration,
    model: &ModelGeometry,
    present: &BTreeSet<SiteKey>,
) -> BTreeMap<SiteKey, String> {
    let map = ModuleMap::default();
    let root = &declaration.root;
    let mut names = BTreeMap::from([
        (SiteKey::Embed, format!("{root}embed_tokens")),
        (SiteKey::Head, "lm_head".to_owned()),
    ]);
    for path in &model.hf_modules {
        let Some(module) = map.lookup(path).filter(|m| !m.is_routed_expert()) else { continue };
        // In some releases of transformers the router is a bare parameter, which PEFT does not reach.
        let optional = module == TargetModule::MoeRouter;
        if optional && !present.iter().any(|key| key.module() == Some(module)) {
            continue;
        }
        let path = declaration.naming.get(&module).map_or(path.as_str(), |n| n.path.as_str());
        for layer in (0u32..).take(model.layers) {
            let name = format!("{root}layers.{layer}.{path}");
            names.insert(SiteKey::Layer(LayerIdx(layer), module), name);
        }
    }
    names.extend(experts::names(declaration, model));
    names
}
