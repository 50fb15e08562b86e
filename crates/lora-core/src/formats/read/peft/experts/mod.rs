//! Routed experts: from the layout of a file to one stack of matrices for each module,
//! A `[experts, rank, in]` and B `[experts, out, rank]`.
//!
//! The layout is detected, never guessed: names tell the families apart, shapes and the release of
//! PEFT the members of a family, and what they leave open is refused.

use std::collections::{BTreeMap, BTreeSet};

use super::config::{PeftConfig, Variant};
use crate::adapter::{LowRank, ModuleNaming, RowOrder};
use crate::config::ExpertLayout;
use crate::formats::ReadOptions;
use crate::formats::read::assemble::PlannedSites;
use crate::formats::read::plan::Plan;
use crate::ids::LayerIdx;
use crate::modules::{SiteKey, TargetModule};
use crate::rules::{Code, Rejection, listed};

mod collect;
mod each;
mod keys;
mod modules;
mod parameters;
mod release;

pub(super) use collect::ExpertTensors;
pub(super) use keys::parse;
pub(super) use modules::GATE_UP;
pub(super) use parameters::DOWN;

/// What the routed-expert tensors of a file come to.
pub(super) struct PlannedExperts {
    pub sites: PlannedSites,
    pub layout: ExpertLayout,
    pub naming: BTreeMap<TargetModule, ModuleNaming>,
    /// PEFT's names of the modules and parameters that were met.
    pub names: Vec<String>,
}

/// Makes sites of the tensors; `None` if there are none, or if they cannot be understood. About
/// tensors beside one that cannot be used, nothing more is said.
pub(super) fn plan(
    tensors: &ExpertTensors,
    root: &str,
    config: &PeftConfig,
    options: &ReadOptions,
    problems: &mut Vec<Rejection>,
) -> Option<PlannedExperts> {
    if tensors.layers.is_empty() || tensors.broken {
        return None;
    }
    check_variant(config, problems);
    let mut planner = Planner {
        root,
        config,
        options,
        problems,
        sites: PlannedSites::new(),
        naming: BTreeMap::new(),
        names: Vec::new(),
    };
    let layout = planner.plan(tensors)?;
    let Planner { sites, naming, names, .. } = planner;
    Some(PlannedExperts { sites, layout, naming, names })
}

/// PEFT combines routed experts with neither of the extras.
fn check_variant(config: &PeftConfig, problems: &mut Vec<Rejection>) {
    let (code, field) = match config.variant {
        Variant::Plain => return,
        Variant::Dora => (Code::DoraOnExperts, "use_dora"),
        Variant::OutputBias => (Code::UnsupportedConfigField, "lora_bias"),
    };
    problems.push(Rejection::new(
        code,
        field,
        "true, with weights of routed experts (moe_h_to_4h, moe_gate, moe_4h_to_h)",
        "false with routed experts",
        "train the experts without it",
    ));
}

/// Layouts whose tensors have the same kind of names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Family {
    Each,
    Modules,
    Parameters,
}

struct Planner<'a> {
    root: &'a str,
    config: &'a PeftConfig,
    options: &'a ReadOptions,
    problems: &'a mut Vec<Rejection>,
    sites: PlannedSites,
    naming: BTreeMap<TargetModule, ModuleNaming>,
    names: Vec<String>,
}

impl Planner<'_> {
    fn plan(&mut self, tensors: &ExpertTensors) -> Option<ExpertLayout> {
        let family = self.family(tensors)?;
        match family {
            Family::Each => self.each(tensors),
            Family::Modules => self.modules(tensors),
            Family::Parameters => self.parameters(tensors),
        }
    }

    /// The family of all tensors; more than one in a file is a rejection.
    fn family(&mut self, tensors: &ExpertTensors) -> Option<Family> {
        let mut families = BTreeSet::new();
        for layer in tensors.layers.values() {
            let present = [
                (Family::Each, !layer.each.is_empty()),
                (Family::Modules, !layer.modules.is_empty()),
                (Family::Parameters, !(layer.inner.is_empty() && layer.outer.is_empty())),
            ];
            families.extend(present.iter().filter(|(_, there)| *there).map(|(family, _)| *family));
        }
        if families.len() > 1 {
            self.problems.push(Rejection::new(
                Code::RoutedExpertLayout,
                "routed experts",
                "tensors of several layouts in one file",
                "one layout for all layers",
                "export the adapter again",
            ));
        }
        families.pop_first().filter(|_| families.is_empty())
    }

    /// The layout, given the ones of the family that `moe_layout` may choose, of which the first is
    /// the one that was found.
    fn settle(&mut self, possible: &[ExpertLayout]) -> Option<ExpertLayout> {
        let found = *possible.first()?;
        let Some(asked) = self.options.moe_layout else {
            return Some(found);
        };
        if !possible.contains(&asked) {
            self.problems.push(Rejection::new(
                Code::RoutedExpertLayout,
                "moe_layout",
                format!("{asked}, for tensors that are {found}"),
                listed(possible),
                "leave moe_layout out to have the layout detected, or correct it",
            ));
            return None;
        }
        Some(asked)
    }

    /// gpt-oss has gate and up rows in turn; nothing in a file's tensors shows it.
    fn refuse_unmarked_interleaving(&mut self, interleaved: ExpertLayout, halves: ExpertLayout) {
        let base = self.config.base_model_name.as_deref().unwrap_or_default().to_lowercase();
        let alternating = base.contains("gpt-oss") || base.contains("gpt_oss");
        if alternating && self.options.moe_layout.is_none() {
            self.problems.push(Rejection::new(
                Code::AmbiguousExpertLayout,
                "base_model_name_or_path",
                format!("{base:?}, whose gate and up rows alternate in gate_up_proj"),
                "moe_layout, to say how this adapter's rows lie",
                format!("set moe_layout to {interleaved} or {halves}"),
            ));
        }
    }

    /// Notes what the file calls a module; another name in another layer is a rejection.
    fn name(&mut self, module: TargetModule, path: &str) {
        let naming = ModuleNaming { path: path.to_owned(), mapped_exactly: false };
        let known = self.naming.entry(module).or_insert(naming);
        if known.path != path {
            self.problems.push(Rejection::new(
                Code::UnknownModule,
                "routed experts",
                format!("the module `{path}`, which other layers call `{}`", known.path),
                "one name for one module",
                "export the adapter again",
            ));
        }
    }

    /// The module that a name under `experts` stands for; an unknown one is a rejection.
    fn module(&mut self, block: &str, name: &str) -> Option<TargetModule> {
        let path = format!("{block}.{name}");
        let module = self.options.modules.lookup(&path).filter(|m| m.is_routed_expert());
        if module.is_none() {
            self.problems.push(Rejection::new(
                Code::UnknownModule,
                path,
                "a module of routed experts that the module map does not name",
                "a name of moe_h_to_4h, moe_gate or moe_4h_to_h",
                "map it with trtllm_modules_to_hf_modules",
            ));
        }
        module
    }

    /// Adds a site; two tensors for one module are a rejection.
    fn insert(
        &mut self,
        layer: u32,
        module: TargetModule,
        update: (usize, f32),
        [a, b]: [Plan; 2],
    ) {
        let (rank, scale) = update;
        let (magnitude, b_bias, rows) = (None, None, RowOrder::ByPart);
        let low = LowRank { rank, scale, a, b, magnitude, b_bias, rows };
        let key = SiteKey::Layer(LayerIdx(layer), module);
        if self.sites.insert(key, low.into()).is_some() {
            self.problems.push(Rejection::new(
                Code::DuplicateTensor,
                key.to_string(),
                "two names for one module",
                "one update of a module",
                "export the adapter again",
            ));
        }
    }

    /// The rank that the configuration states for a module, which must be the one `found`, and the
    /// scale of the pair.
    fn update(&mut self, module: &str, tensor: &str, found: usize) -> Option<(usize, f32)> {
        self.names.push(module.to_owned());
        let stated = self.told(self.config.ranks.of(module))?;
        if found != stated {
            self.problems.push(Rejection::new(
                Code::RankMismatch,
                tensor,
                format!("rank {found}"),
                format!("rank {stated}, by r and rank_pattern"),
                "correct r or rank_pattern in adapter_config.json",
            ));
            return None;
        }
        let alpha = self.told(self.config.alphas.of(module))?;
        let scale = self.config.scaling.scale(alpha, found);
        if !scale.is_finite() {
            self.problems.push(Rejection::new(
                Code::InvalidConfigField,
                "lora_alpha",
                format!("alpha {alpha} for {module}"),
                "an alpha whose scale is a finite float32",
                "correct lora_alpha or alpha_pattern in adapter_config.json",
            ));
            return None;
        }
        Some((found, scale))
    }

    fn told<T>(&mut self, result: Result<T, Rejection>) -> Option<T> {
        result.map_err(|problem| self.problems.push(problem)).ok()
    }

    fn wrong_shape(&mut self, name: &str, found: &[usize], allowed: impl Into<String>) {
        self.problems.push(Rejection::new(
            Code::TensorShape,
            name,
            format!("shape {found:?}"),
            allowed,
            "export it again",
        ));
    }
}
