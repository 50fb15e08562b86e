//! Groups the tensors of routed experts by layer, form and module.

use std::collections::BTreeMap;

use super::super::keys::Kind;
use super::keys::{ExpertKey, Form};
use crate::formats::read::pair::{duplicate, incomplete};
use crate::formats::read::view::View;
use crate::rules::{Code, Rejection};

/// Routed-expert tensors of a file.
#[derive(Default, Debug)]
pub struct ExpertTensors {
    /// By layer.
    pub layers: BTreeMap<u32, LayerTensors>,
    /// Whether a tensor is unusable, which was reported.
    pub broken: bool,
}

/// Routed-expert tensors of a layer.
#[derive(Default, Debug)]
pub struct LayerTensors {
    /// The path up to `experts`.
    pub block: String,
    /// By module, then by expert.
    pub each: BTreeMap<String, BTreeMap<u32, Halves>>,
    /// By module.
    pub modules: BTreeMap<String, Halves>,
    /// Pair of the first of two target parameters.
    pub inner: Halves,
    /// Pair of the second target parameter, or of the only one.
    pub outer: Halves,
}

/// `lora_A` and `lora_B` of a pair, as far as the file has them.
#[derive(Default, Debug)]
pub struct Halves {
    pub a: Option<View>,
    pub b: Option<View>,
}

impl Halves {
    /// Whether neither is present.
    pub fn is_empty(&self) -> bool {
        self.a.is_none() && self.b.is_none()
    }

    /// Both matrices; only one of them is a rejection.
    pub fn pair(&self, problems: &mut Vec<Rejection>) -> Option<(&View, &View)> {
        match (&self.a, &self.b) {
            (Some(a), Some(b)) => Some((a, b)),
            (None, None) => None,
            (Some(only), None) | (None, Some(only)) => {
                problems.push(incomplete(only, "lora_A together with lora_B"));
                None
            }
        }
    }
}

impl ExpertTensors {
    /// Adds a tensor.
    pub fn insert(&mut self, key: &ExpertKey<'_>, tensor: View, problems: &mut Vec<Rejection>) {
        let layer = self.layers.entry(key.layer).or_default();
        if layer.block.is_empty() {
            key.block.clone_into(&mut layer.block);
        } else if layer.block != key.block {
            problems.push(other_block(&tensor, &layer.block));
            return;
        }
        let halves = match key.form {
            Form::Each { expert, module } => {
                if !layer.each.contains_key(module) {
                    layer.each.insert(module.to_owned(), BTreeMap::new());
                }
                let experts = layer.each.entry(module.to_owned()).or_default();
                experts.entry(expert).or_default()
            }
            Form::Module(module) => layer.modules.entry(module.to_owned()).or_default(),
            Form::Parameter { inner: true } => &mut layer.inner,
            Form::Parameter { inner: false } => &mut layer.outer,
        };
        let half = match key.kind {
            Kind::A => &mut halves.a,
            Kind::B => &mut halves.b,
            Kind::Magnitude => return problems.push(magnitude(&tensor)),
            _ => return problems.push(no_part(&tensor)),
        };
        match half {
            Some(other) => problems.push(duplicate(tensor.name(), other.name())),
            None => *half = Some(tensor),
        }
    }
}

fn magnitude(tensor: &View) -> Rejection {
    Rejection::new(
        Code::DoraOnExperts,
        tensor.name(),
        "a DoRA magnitude on routed experts",
        "plain LoRA on routed experts",
        "train the experts without use_dora",
    )
}

fn no_part(tensor: &View) -> Rejection {
    Rejection::new(
        Code::UnknownTensor,
        tensor.name(),
        "a tensor of routed experts that is neither lora_A nor lora_B",
        "lora_A and lora_B",
        "train the experts without biases, and without saving their weights",
    )
}

fn other_block(tensor: &View, block: &str) -> Rejection {
    Rejection::new(
        Code::UnknownModule,
        tensor.name(),
        format!("experts under another name than `{block}`"),
        "one block of routed experts in a layer",
        "export it again",
    )
}
