//! The contents of a PEFT directory, collected before anything is written.

use super::stack::LazyTensor;

/// Prefix of PEFT's tensor names.
const PREFIX: &str = "base_model.model.";

/// The tensors, and the modules that the configuration must declare for them.
#[derive(Default)]
pub(super) struct Contents {
    pub tensors: Vec<(String, LazyTensor)>,
    pub updates: Vec<SiteUpdate>,
    /// Modules with a low-rank update.
    pub targets: Vec<Target>,
    /// Parameters of routed experts with a low-rank update: layer and path.
    pub parameters: Vec<(u32, &'static str)>,
}

/// Rank and scale of a low-rank update.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct SiteUpdate {
    /// A regular expression that matches exactly the PEFT names of its modules.
    pub key: String,
    pub rank: usize,
    pub scale: f32,
}

/// A module that `target_modules` must name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Target {
    /// Its layer, if it belongs to one.
    pub layer: Option<u32>,
    /// Its path inside the layer, or its full name outside of layers.
    pub path: String,
}

impl Contents {
    /// Adds a tensor of a module; `kind` is the rest of its PEFT name.
    pub fn add(&mut self, module: &str, kind: &str, tensor: LazyTensor) {
        self.tensors.push((format!("{PREFIX}{module}.{kind}"), tensor));
    }

    /// Adds both matrices of a pair.
    pub fn add_pair(&mut self, module: &str, [a, b]: [LazyTensor; 2]) {
        self.add(module, "lora_A.weight", a);
        self.add(module, "lora_B.weight", b);
    }
}
