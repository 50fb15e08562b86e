//! Names of routed-expert tensors inside a layer.
//!
//! ```text
//! path = block ".experts." expert "." module "." kind      one pair for each expert
//!      | block ".experts." module "." kind                 one pair for all of them
//!      | block ".experts." [ "base_layer." ] kind          PEFT's target_parameters
//! ```

use super::super::keys::{self, Kind, MODEL};

/// A parsed name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExpertKey<'a> {
    /// The part before `layers`.
    pub prefix: &'a str,
    /// `model.` or nothing.
    pub root: &'static str,
    pub layer: u32,
    /// The path up to `experts`, such as `mlp.experts`.
    pub block: &'a str,
    pub form: Form<'a>,
    pub kind: Kind,
    /// PEFT's internal name of the adapter, if the file has it.
    pub adapter: Option<&'a str>,
}

/// The form of a name under `experts`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form<'a> {
    /// `experts.{expert}.{module}`.
    Each { expert: u32, module: &'a str },
    /// `experts.{module}`.
    Module(&'a str),
    /// `experts.base_layer` (inner, the first of two target parameters) or `experts`.
    Parameter { inner: bool },
}

/// Parses a name; `None` when it is not in the grammar.
pub fn parse(name: &str) -> Option<ExpertKey<'_>> {
    let inner = name.strip_prefix("base_model.model.").unwrap_or(name);
    let root = if inner.starts_with(MODEL) { MODEL } else { "" };
    let prefix = &name[..name.len() - inner.len() + root.len()];
    let (layer, path) = keys::split_layer(inner.strip_prefix(root)?)?;
    let (head, rest) = path.split_once("experts.")?;
    if !(head.is_empty() || head.ends_with('.')) || head.split('.').any(|p| p.starts_with("lora_"))
    {
        return None;
    }
    let block = &path[..head.len() + "experts".len()];
    let (form, tail) = parse_form(rest)?;
    let (kind, adapter) = parse_kind(tail)?;
    Some(ExpertKey { prefix, root, layer, block, form, kind, adapter })
}

fn parse_form(rest: &str) -> Option<(Form<'_>, &str)> {
    if rest.starts_with("lora_") {
        return Some((Form::Parameter { inner: false }, rest));
    }
    let (first, rest) = rest.split_once('.')?;
    if first == "base_layer" {
        return Some((Form::Parameter { inner: true }, rest));
    }
    match keys::number(first) {
        Some(expert) => {
            let (module, rest) = rest.split_once('.')?;
            let part = module.is_empty() || module.starts_with("lora_");
            let named = !part && keys::number(module).is_none();
            named.then_some((Form::Each { expert, module }, rest))
        }
        None if first.is_empty() => None,
        None => Some((Form::Module(first), rest)),
    }
}

/// Some exports store stacks as parameters rather than layers, without `.weight`.
fn parse_kind(tail: &str) -> Option<(Kind, Option<&str>)> {
    match tail {
        "lora_A" => Some((Kind::A, None)),
        "lora_B" => Some((Kind::B, None)),
        _ => keys::parse_kind(tail, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_told_by_what_stands_under_experts() {
        let cases = [
            (
                "base_model.model.model.layers.3.block_sparse_moe.experts.7.w1.lora_A.weight",
                ("block_sparse_moe.experts", Form::Each { expert: 7, module: "w1" }, Kind::A),
            ),
            (
                "model.layers.3.mlp.experts.up_proj.lora_B.weight",
                ("mlp.experts", Form::Module("up_proj"), Kind::B),
            ),
            (
                "layers.3.mlp.experts.gate_up_proj.lora_A",
                ("mlp.experts", Form::Module("gate_up_proj"), Kind::A),
            ),
            (
                "model.layers.3.mlp.experts.base_layer.lora_A.default.weight",
                ("mlp.experts", Form::Parameter { inner: true }, Kind::A),
            ),
            (
                "model.layers.3.mlp.experts.lora_B.weight",
                ("mlp.experts", Form::Parameter { inner: false }, Kind::B),
            ),
        ];
        for (name, (block, form, kind)) in cases {
            let key = parse(name).unwrap();
            assert_eq!(
                (key.layer, key.block, key.form, key.kind),
                (3, block, form, kind),
                "{name}"
            );
        }
    }

    #[test]
    fn names_outside_the_grammar_are_not_guessed() {
        for name in [
            "model.layers.3.mlp.experts",
            "model.layers.3.mlp.experts.lora_C.weight",
            "model.layers.3.mlp.experts.3.lora_A.weight",
            "model.layers.3.mlp.experts.03.w1.lora_A.weight",
            "model.layers.3.mlp.experts.1.2.lora_A.weight",
            "model.layers.3.mlp.experts.base_layer.base_layer.lora_A.weight",
            "model.layers.3.mlp.experts..lora_A.weight",
            "model.layers.x.mlp.experts.w1.lora_A.weight",
            "mlp.experts.w1.lora_A.weight",
        ] {
            assert_eq!(parse(name), None, "{name}");
        }
    }
}
