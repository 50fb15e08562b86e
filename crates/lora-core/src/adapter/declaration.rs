//! What a PEFT configuration says an adapter changes.

use std::collections::{BTreeMap, BTreeSet};

use crate::modules::{SiteKey, TargetModule};

/// Modules chosen by name or by pattern, as PEFT's `target_modules` and `exclude_modules` do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Selector {
    /// Modules whose name is one of these, or ends with `.` and one of these.
    Names(Vec<String>),
    /// Modules whose whole name matches this regular expression.
    Pattern(String),
    /// Every linear layer but the output projection.
    AllLinear,
}

/// PEFT's `layers_to_transform` and `layers_pattern`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerFilter {
    /// Layers that are changed.
    pub layers: BTreeSet<u32>,
    /// Regular expressions for the name in front of the layer's number; empty: any name.
    pub patterns: Vec<String>,
}

/// What a file calls one kind of module inside a layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModuleNaming {
    /// Its path, such as `self_attn.q_proj`.
    pub path: String,
    /// Whether the module map names this very path, so that it needs no other check.
    pub mapped_exactly: bool,
}

/// Which modules the adapter's configuration says it changes, kept so that
/// [`Adapter::check`] can tell when a file and its configuration disagree about a model.
#[derive(Clone, PartialEq, Debug)]
pub struct Declaration {
    /// `target_modules`.
    pub targets: Selector,
    /// `target_parameters`: parameters of routed experts and routers, such as
    /// `mlp.experts.down_proj` and `gate.weight`.
    pub parameters: Vec<String>,
    /// `exclude_modules`.
    pub exclude: Option<Selector>,
    /// `layers_to_transform`; `None`: all layers.
    pub layers: Option<LayerFilter>,
    /// `modules_to_save`.
    pub saved: Vec<String>,
    /// `ensure_weight_tying`.
    pub ensure_weight_tying: bool,
    /// What stands before `layers` in the file's module names: `model.` or nothing.
    pub root: String,
    /// What the file calls the modules that it changes.
    pub naming: BTreeMap<TargetModule, ModuleNaming>,
    /// Sites of which the file has a trained weight, whether or not it differs from the base model's.
    pub saved_sites: BTreeSet<SiteKey>,
}

impl Declaration {
    /// Whether `modules_to_save` names a module of this name, or one that it is a part of. PEFT compares
    /// ends of names, without regard to dots.
    pub fn saves(&self, name: &str) -> bool {
        self.saved.iter().any(|entry| is_saved_by(entry, name))
    }
}

/// Whether an entry of `modules_to_save` names a module, or one that it is a part of.
pub(crate) fn is_saved_by(entry: &str, name: &str) -> bool {
    let mut ends = name.match_indices('.').map(|(at, _)| at).chain([name.len()]);
    ends.any(|end| name[..end].ends_with(entry))
}
