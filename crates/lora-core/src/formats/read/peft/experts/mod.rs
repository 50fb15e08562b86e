//! Routed experts: converts the layout of a file to one pair of stacks for each module,
//! A `[experts, rank, in]` and B `[experts, out, rank]`.
//!
//! The layout is detected and never guessed. Tensor names determine its family; shapes and the PEFT release
//! distinguish the layouts of a family. An ambiguous file is refused.

use std::collections::{BTreeMap, BTreeSet};

use super::config::{PeftConfig, Variant};
use crate::adapter::ModuleNaming;
use crate::config::ExpertLayout;
use crate::formats::ReadOptions;
use crate::formats::read::plan::PlannedSites;
use crate::modules::TargetModule;
use crate::rules::{Code, Rejection};

mod collect;
mod each;
mod keys;
mod modules;
mod parameters;
mod planner;
mod release;

pub(super) use collect::ExpertTensors;
pub(super) use keys::parse;

use planner::Planner;

/// The sites made from the routed-expert tensors of a file.
pub(super) struct PlannedExperts {
    pub sites: PlannedSites,
    pub layout: ExpertLayout,
    pub naming: BTreeMap<TargetModule, ModuleNaming>,
    /// PEFT's names of the modules and parameters in the file.
    pub names: Vec<String>,
}

/// Makes sites from the tensors; `None` if there are none, or if they are refused. If a tensor is unusable,
/// which was reported, the others are not looked at.
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

/// PEFT supports neither DoRA nor `lora_bias` on routed experts.
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

/// Layouts whose tensors are named alike.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Family {
    Each,
    Modules,
    Parameters,
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

    /// The family of the file; more than one is a rejection.
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
}
