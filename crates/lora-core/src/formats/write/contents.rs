//! What goes into a PEFT directory, collected before anything is written.

use super::stack::Laid;

/// What PEFT's own names of tensors begin with.
const PREFIX: &str = "base_model.model.";

/// Tensors, and what the configuration has to say about them.
#[derive(Default)]
pub(super) struct Contents {
    pub tensors: Vec<(String, Laid)>,
    pub updates: Vec<Update>,
    /// Modules with a low-rank update.
    pub targets: Vec<Target>,
    /// Parameters of routed experts with a low-rank update: layer and path.
    pub parameters: Vec<(u32, &'static str)>,
}

/// Rank and scale of a low-rank update.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Update {
    /// A regular expression that matches PEFT's names of the modules, and of no others.
    pub key: String,
    pub rank: usize,
    pub scale: f32,
}

/// A module as `target_modules` names it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Target {
    /// Its layer, if it is in one.
    pub layer: Option<u32>,
    /// Its path inside the layer, else its whole name.
    pub path: String,
}

impl Contents {
    /// Adds a tensor of a module: `kind` is what PEFT's name has behind the module's.
    pub fn add(&mut self, module: &str, kind: &str, tensor: Laid) {
        self.tensors.push((format!("{PREFIX}{module}.{kind}"), tensor));
    }

    /// Adds both matrices of a pair.
    pub fn add_pair(&mut self, module: &str, [a, b]: [Laid; 2]) {
        self.add(module, "lora_A.weight", a);
        self.add(module, "lora_B.weight", b);
    }
}
