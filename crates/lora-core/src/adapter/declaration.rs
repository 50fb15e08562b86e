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
    /// Layers that are adapted.
    pub layers: BTreeSet<u32>,
    /// Regular expressions for the name before the layer number; any name if empty.
    pub patterns: Vec<String>,
}

/// The name of a module inside a layer, in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModuleNaming {
    /// Its path, such as `self_attn.q_proj`.
    pub path: String,
    /// Whether the module map names exactly this path, so that it need not be a path of the model.
    pub mapped_exactly: bool,
}

/// The modules that the adapter's configuration targets. [`Adapter::check`](super::Adapter::check) uses it to
/// find where the configuration and the tensors of a file disagree on a model.
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
    /// The part before `layers` in the file's module names: `model.` or nothing.
    pub root: String,
    /// The file's names of the modules that it changes.
    pub naming: BTreeMap<TargetModule, ModuleNaming>,
    /// Sites with a full weight in the file, whether or not it differs from the base model's.
    pub saved_sites: BTreeSet<SiteKey>,
}

impl Declaration {
    /// Whether `modules_to_save` names the module of this name or a parent of it. PEFT compares ends of
    /// names, regardless of dots.
    pub fn saves(&self, name: &str) -> bool {
        self.saved.iter().any(|entry| is_saved_by(entry, name))
    }
}

/// Whether an entry of `modules_to_save` names a module or a parent of it.
pub(crate) fn is_saved_by(entry: &str, name: &str) -> bool {
    let mut ends = name.match_indices('.').map(|(at, _)| at).chain([name.len()]);
    ends.any(|end| name[..end].ends_with(entry))
}
