//! The grammar of tensor names in PEFT files.
//!
//! ```text
//! name  = [ "base_model.model." ] ( root | "" ) place "." kind
//! root  = "model."
//! place = "lm_head" | "embed_tokens" | "norm" | "layers." number "." path
//! kind  = "lora_A.weight" | "lora_B.weight" | "lora_B.bias" | "lora_magnitude_vector" [".weight"]
//!       | "lora_embedding_A" | "lora_embedding_B" | [ "base_layer." ] ( "weight" | "bias" )
//!       | ( "modules_to_save." | "original_module." ) ( "weight" | "bias" ) | "token_adapter.base_layer.weight"
//!       | "token_adapter.trainable_tokens_delta"
//! ```
//! PEFT's internal name of the adapter may stand after the first part of a kind, as in
//! `lora_A.default.weight`.

pub(super) use crate::ids::number;
use crate::modules::NormKind;

/// The role of a tensor in its module.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Kind {
    /// `lora_A`, or `lora_embedding_A` of an embedding.
    A,
    /// `lora_B`, or `lora_embedding_B` of an embedding.
    B,
    /// Bias of `lora_B`.
    BBias,
    /// DoRA's magnitude.
    Magnitude,
    /// Bias of the base layer, or of the copy that `modules_to_save` trains.
    BaseBias,
    /// Bias of a module that `modules_to_save` replaces by a trained copy; unused.
    OriginalBias,
    /// A full weight.
    Full(FullName),
    /// Trained rows of the vocabulary.
    TokenRows,
}

/// The part of a full weight's name before `weight`; see [`super::full`] for its meaning.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum FullName {
    /// Nothing.
    Plain,
    /// `modules_to_save`.
    ModulesToSave,
    /// `original_module`.
    OriginalModule,
    /// `base_layer`.
    BaseLayer,
    /// `token_adapter.base_layer`.
    TokenBaseLayer,
}

/// The module that a tensor belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place<'a> {
    Embed,
    Head,
    FinalNorm,
    Norm { index: u32, kind: NormKind },
    Layer { index: u32, path: &'a str },
}

/// A parsed name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Key<'a> {
    /// The prefix before the place: `base_model.model.` or nothing, then the root.
    pub prefix: &'a str,
    /// `model.` or nothing.
    pub root: &'static str,
    /// PEFT's name of the module, without `base_model.model.`.
    pub module: &'a str,
    pub place: Place<'a>,
    pub kind: Kind,
    /// PEFT's internal name of the adapter, if the file has it.
    pub adapter: Option<&'a str>,
}

pub(super) const MODEL: &str = "model.";

/// The gate and up projections of all routed experts, as one module or parameter.
pub(super) const GATE_UP: &str = "gate_up_proj";

/// The down projections of all routed experts.
pub(super) const DOWN: &str = "down_proj";

/// Parses a name; `None` when it is not in the grammar.
pub(super) fn parse(name: &str) -> Option<Key<'_>> {
    let inner = name.strip_prefix("base_model.model.").unwrap_or(name);
    let root = if inner.starts_with(MODEL) { MODEL } else { "" };
    let prefix = &name[..name.len() - inner.len() + root.len()];
    let (module, tail) = split(inner)?;
    let place = parse_place(module.strip_prefix(MODEL).unwrap_or(module), root)?;
    let (kind, adapter) = parse_kind(tail, place == Place::Embed)?;
    Some(Key { prefix, root, module, place, kind, adapter })
}

/// Whether a name belongs to routed experts.
pub(super) fn is_routed_expert(name: &str) -> bool {
    name.split('.').any(|part| part == "experts")
}

/// Splits a name into module and kind.
fn split(name: &str) -> Option<(&str, &str)> {
    const STARTS: [&str; 11] = [
        ".lora_A",
        ".lora_B",
        ".lora_magnitude_vector",
        ".lora_embedding_A",
        ".lora_embedding_B",
        ".base_layer",
        ".modules_to_save",
        ".original_module",
        ".token_adapter",
        ".weight",
        ".bias",
    ];
    let at = STARTS.iter().filter_map(|start| find_part(name, start)).min()?;
    Some((&name[..at], &name[at + 1..]))
}

/// The position of a dotted component.
fn find_part(name: &str, part: &str) -> Option<usize> {
    let ends = |at: usize| matches!(name.as_bytes().get(at + part.len()), None | Some(b'.'));
    name.match_indices(part).map(|(at, _)| at).find(|at| ends(*at))
}

fn parse_place<'a>(place: &'a str, root: &str) -> Option<Place<'a>> {
    match place {
        "embed_tokens" => return Some(Place::Embed),
        "norm" => return Some(Place::FinalNorm),
        "lm_head" => return root.is_empty().then_some(Place::Head),
        _ => {}
    }
    let (index, path) = split_layer(place)?;
    if let Some(kind) = NormKind::from_hf_path(path) {
        return Some(Place::Norm { index, kind });
    }
    let plain = |part: &str| !part.is_empty() && !part.starts_with("lora_");
    path.split('.').all(plain).then_some(Place::Layer { index, path })
}

/// The layer number, and the path after it.
pub(super) fn split_layer(place: &str) -> Option<(u32, &str)> {
    let (digits, path) = place.strip_prefix("layers.")?.split_once('.')?;
    Some((number(digits)?, path))
}

pub(super) fn parse_kind(tail: &str, embedding: bool) -> Option<(Kind, Option<&str>)> {
    let parts: Vec<&str> = tail.split('.').collect();
    let (head, rest) = parts.split_first()?;
    let (kind, adapter) = match (*head, rest) {
        ("lora_A", ["weight"]) if !embedding => (Kind::A, None),
        ("lora_A", [adapter, "weight"]) if !embedding => (Kind::A, Some(*adapter)),
        ("lora_B", ["weight"]) if !embedding => (Kind::B, None),
        ("lora_B", [adapter, "weight"]) if !embedding => (Kind::B, Some(*adapter)),
        ("lora_B", ["bias"]) if !embedding => (Kind::BBias, None),
        ("lora_B", [adapter, "bias"]) if !embedding => (Kind::BBias, Some(*adapter)),
        ("lora_embedding_A", []) if embedding => (Kind::A, None),
        ("lora_embedding_A", [adapter]) if embedding => (Kind::A, Some(*adapter)),
        ("lora_embedding_B", []) if embedding => (Kind::B, None),
        ("lora_embedding_B", [adapter]) if embedding => (Kind::B, Some(*adapter)),
        ("lora_magnitude_vector", [] | ["weight"]) => (Kind::Magnitude, None),
        ("lora_magnitude_vector", [adapter] | [adapter, "weight"]) => {
            (Kind::Magnitude, Some(*adapter))
        }
        ("bias", []) | ("base_layer" | "modules_to_save", ["bias"]) => (Kind::BaseBias, None),
        ("modules_to_save", [adapter, "bias"]) => (Kind::BaseBias, Some(*adapter)),
        ("original_module", ["bias"]) => (Kind::OriginalBias, None),
        ("weight", []) => (Kind::Full(FullName::Plain), None),
        ("modules_to_save", ["weight"]) => (Kind::Full(FullName::ModulesToSave), None),
        ("modules_to_save", [adapter, "weight"]) => {
            (Kind::Full(FullName::ModulesToSave), Some(*adapter))
        }
        ("original_module", ["weight"]) => (Kind::Full(FullName::OriginalModule), None),
        ("base_layer", ["weight"]) => (Kind::Full(FullName::BaseLayer), None),
        ("token_adapter", ["base_layer", "weight"]) => (Kind::Full(FullName::TokenBaseLayer), None),
        ("token_adapter", ["trainable_tokens_delta"]) => (Kind::TokenRows, None),
        ("token_adapter", ["trainable_tokens_delta", adapter]) => (Kind::TokenRows, Some(*adapter)),
        _ => return None,
    };
    let named = |name: &str| !matches!(name, "" | "weight" | "bias");
    adapter.is_none_or(named).then_some((kind, adapter))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_peft_files_are_understood() {
        let key = parse("base_model.model.model.layers.12.self_attn.q_proj.lora_A.weight").unwrap();
        assert_eq!(key.place, Place::Layer { index: 12, path: "self_attn.q_proj" });
        assert_eq!((key.root, key.kind, key.adapter), ("model.", Kind::A, None));
        assert_eq!(key.prefix, "base_model.model.model.");
        assert_eq!(key.module, "model.layers.12.self_attn.q_proj");
        let parsed = [
            ("lm_head.weight", (Place::Head, Kind::Full(FullName::Plain), None)),
            (
                "base_model.model.lm_head.modules_to_save.default.weight",
                (Place::Head, Kind::Full(FullName::ModulesToSave), Some("default")),
            ),
            ("base_model.model.model.embed_tokens.lora_embedding_B", (Place::Embed, Kind::B, None)),
        ];
        let norm = Place::Norm { index: 7, kind: NormKind::Query };
        let others = [
            ("model.norm.weight", (Place::FinalNorm, Kind::Full(FullName::Plain), None)),
            (
                "model.layers.7.self_attn.q_norm.original_module.weight",
                (norm, Kind::Full(FullName::OriginalModule), None),
            ),
            (
                "model.embed_tokens.token_adapter.trainable_tokens_delta",
                (Place::Embed, Kind::TokenRows, None),
            ),
            (
                "lm_head.token_adapter.base_layer.weight",
                (Place::Head, Kind::Full(FullName::TokenBaseLayer), None),
            ),
        ];
        let place = Place::Layer { index: 0, path: "self_attn.q_proj" };
        let in_layer = [
            ("layers.0.self_attn.q_proj.lora_B.a.bias", (place, Kind::BBias, Some("a"))),
            ("layers.0.self_attn.q_proj.lora_magnitude_vector", (place, Kind::Magnitude, None)),
            (
                "layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
                (place, Kind::Magnitude, None),
            ),
            ("layers.0.self_attn.q_proj.base_layer.bias", (place, Kind::BaseBias, None)),
        ];
        for (name, expected) in parsed.into_iter().chain(others).chain(in_layer) {
            let key = parse(name).unwrap();
            assert_eq!((key.place, key.kind, key.adapter), expected, "{name}");
        }
    }

    #[test]
    fn names_outside_the_grammar_are_not_guessed() {
        for name in [
            "",
            "model.layers.0.q_proj",
            "model.layers.00.mlp.up_proj.lora_A.weight",
            "model.layers.+1.mlp.up_proj.lora_A.weight",
            "model.layers.0..lora_A.weight",
            "model.layers.0.mlp.up_proj.lora_A",
            "model.layers.0.mlp.up_proj.lora_C.weight",
            "model.layers.0.mlp.up_proj.lora_A.weight.weight",
            "model.embed_tokens.lora_A.weight",
            "model.lm_head.weight",
            "model.layers.0.mlp.up_proj.lora_embedding_A",
            "h.0.attn.c_attn.lora_A.weight",
        ] {
            assert_eq!(parse(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_name_is_parsed_or_refused(name in "[a-zA-Z_.0-9é]{0,60}") {
            parse(&name);
        }

        #[test]
        fn every_layer_number_is_kept(index: u32, path in "[a-z]{1,8}\\.[a-z]{1,8}") {
            let name = format!("base_model.model.model.layers.{index}.{path}.lora_B.weight");
            let place = parse(&name).map(|key| key.place);
            let kept = place == Some(Place::Layer { index, path: &path });
            // `weight` and `bias` as module names end the path early.
            prop_assert!(kept || path.contains("weight") || path.contains("bias"));
        }
    }
}
