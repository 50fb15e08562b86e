//! Checks that only routed experts need.

use super::shapes::SiteDims;
use crate::adapter::{Declaration, LowRank, Selector, SiteWeights};
use crate::geometry::ModelGeometry;
use crate::ids::LayerIdx;
use crate::modules::{SiteKey, TargetModule};
use crate::rules::{Code, Rejection};

/// Checks the stacks of a site: `experts` is the number of experts of the model, `dims` are those of
/// one of them.
pub(super) fn check(
    key: SiteKey,
    site: &SiteWeights,
    experts: usize,
    dims: SiteDims,
    problems: &mut Vec<Rejection>,
) {
    let SiteDims { input, output } = dims;
    let Some(LowRank { rank, a, b, .. }) = &site.low_rank else { return };
    for (role, tensor, matrix) in [("lora_A", a, [*rank, input]), ("lora_B", b, [output, *rank])] {
        let shape = tensor.shape();
        if shape.get(1..) != Some(&matrix[..]) || shape[0] > experts {
            let expected = [experts, matrix[0], matrix[1]];
            problems.push(Rejection::new(
                Code::ShapeMismatch,
                format!("{role} of {key}"),
                format!("{shape:?}"),
                format!("{expected:?} on this model"),
                "load the adapter on the model that it was trained for",
            ));
        }
    }
    let stacks = [a, b].map(|tensor| tensor.shape().first().copied().unwrap_or(0));
    let whole = |extent: usize| extent == experts || extent == 1;
    if !stacks.iter().all(|extent| whole(*extent)) || !stacks.contains(&experts) {
        let found = stacks.iter().max().copied().unwrap_or(0);
        problems.push(Rejection::new(
            Code::MissingExperts,
            key.to_string(),
            format!("weights for {found} experts"),
            format!("weights for all {experts} experts of this model"),
            "load the adapter on the model that it was trained for, or read it for this model with \
             allow_missing_experts: true",
        ));
    }
}

/// The names by which a configuration may target routed experts.
///
/// A model may store its experts as modules or as bare parameters, which `all-linear` and patterns do not
/// reach. So experts are expected in a file only if its configuration names them.
pub(super) fn names(declaration: &Declaration, model: &ModelGeometry) -> Vec<(SiteKey, String)> {
    let modules = || TargetModule::all().filter(|module| module.is_routed_expert());
    let named = modules().any(|module| declaration.naming.contains_key(&module));
    let listed = matches!(&declaration.targets, Selector::Names(_));
    if model.num_experts == 0 || !(named || listed || !declaration.parameters.is_empty()) {
        return Vec::new();
    }
    let sibling = modules().find_map(|module| declaration.naming.get(&module));
    let usual = Usual::beside(sibling.map(|naming| naming.path.as_str()), declaration);
    let mut names = Vec::new();
    for module in modules() {
        let path = match declaration.naming.get(&module) {
            Some(naming) => naming.path.clone(),
            None => usual.path(module),
        };
        for layer in (0u32..).take(model.layers) {
            let name = format!("{}layers.{layer}.{path}", declaration.root);
            names.push((SiteKey::Layer(LayerIdx(layer), module), name));
        }
    }
    names
}

/// Names for the routed-expert modules that a file does not have.
struct Usual<'a> {
    /// The path before the module's name.
    block: &'a str,
    /// Names of the gate, up and down projection.
    names: [&'a str; 3],
}

impl<'a> Usual<'a> {
    /// The names in the style of a module that the file has.
    fn beside(sibling: Option<&'a str>, declaration: &Declaration) -> Self {
        let parameters = !declaration.parameters.is_empty();
        let default = if parameters { "mlp.experts" } else { "mlp.experts.0" };
        let (block, name) = match sibling.and_then(|path| path.rsplit_once('.')) {
            Some((block, name)) => (block, name),
            None => (default, ""),
        };
        let names = match name {
            "w1" | "w2" | "w3" => ["w1", "w3", "w2"],
            _ if parameters || name == "gate_up_proj" => {
                ["gate_up_proj", "gate_up_proj", "down_proj"]
            }
            _ => ["gate_proj", "up_proj", "down_proj"],
        };
        Self { block, names }
    }

    fn path(&self, module: TargetModule) -> String {
        let [gate, up, down] = self.names;
        let name = match module {
            TargetModule::MoeHTo4h => gate,
            TargetModule::MoeGate => up,
            _ => down,
        };
        format!("{}.{name}", self.block)
    }
}
