//! The grammar of tensor names in NeMo's adapters.
//!
//! ```text
//! name    = [ root "." ] "layers." number "." adapter "." half ".weight"
//! adapter = "self_attention.adapter_layer." ( "lora_kqv_adapter" | "lora_dense_attention_adapter" )
//!         | "mlp.adapter_layer." ( "lora_hto4h_adapter" | "lora_4htoh_adapter" )
//! half    = "linear_in" | "linear_out"
//! ```

use crate::ids::{LayerIdx, number};
use crate::modules::TargetModule;

/// NeMo's adapter names, and the target modules.
const ADAPTERS: [(&str, TargetModule); 4] = [
    ("self_attention.adapter_layer.lora_kqv_adapter", TargetModule::AttnQkv),
    ("self_attention.adapter_layer.lora_dense_attention_adapter", TargetModule::AttnDense),
    ("mlp.adapter_layer.lora_hto4h_adapter", TargetModule::MlpGateUp),
    ("mlp.adapter_layer.lora_4htoh_adapter", TargetModule::Mlp4hToH),
];

/// A matrix of a pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Half {
    /// `linear_in`, A.
    In,
    /// `linear_out`, B.
    Out,
}

/// A parsed name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Key<'a> {
    /// The part before the layer number.
    pub prefix: &'a str,
    pub layer: LayerIdx,
    pub module: TargetModule,
    pub half: Half,
}

/// Parses a name; `None` when it is not in the grammar.
pub(super) fn parse(name: &str) -> Option<Key<'_>> {
    let (place, half) = match name.strip_suffix(".linear_in.weight") {
        Some(place) => (place, Half::In),
        None => (name.strip_suffix(".linear_out.weight")?, Half::Out),
    };
    let (layer, module) = ADAPTERS.iter().find_map(|(adapter, module)| {
        Some((place.strip_suffix(adapter)?.strip_suffix('.')?, *module))
    })?;
    let (prefix, digits) = layer.rsplit_once('.')?;
    let in_layers = prefix == "layers" || prefix.ends_with(".layers");
    let layer = number(digits).filter(|_| in_layers).map(LayerIdx)?;
    Some(Key { prefix, layer, module, half })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_nemo_files_are_understood() {
        let name = "model.language_model.encoder.layers.11.self_attention.adapter_layer\
                    .lora_kqv_adapter.linear_in.weight";
        let key = parse(name).unwrap();
        assert_eq!(key.prefix, "model.language_model.encoder.layers");
        assert_eq!((key.layer, key.module), (LayerIdx(11), TargetModule::AttnQkv));
        assert_eq!(key.half, Half::In);
        let key = parse("layers.0.mlp.adapter_layer.lora_hto4h_adapter.linear_out.weight").unwrap();
        assert_eq!((key.module, key.half), (TargetModule::MlpGateUp, Half::Out));
    }

    #[test]
    fn names_outside_the_grammar_are_not_guessed() {
        for name in [
            "",
            "model.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.bias",
            "model.layers.0.self_attention.adapter_layer.lora_kqv_adapter.weight",
            "model.layers.00.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight",
            "model.blocks.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight",
            "model.layers.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight",
            "model.layers.0.mlp.adapter_layer.lora_kqv_adapter.linear_in.weight",
            "model.layers.0.mlp.adapter_layer.lora_unfused_hto4h_adapter.linear_in.weight",
            "0.mlp.adapter_layer.lora_hto4h_adapter.linear_in.weight",
        ] {
            assert_eq!(parse(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_name_is_parsed_or_refused(head in "[a-z.0-9é]{0,20}", adapter in 0..4usize) {
            parse(&format!("{head}{}.linear_in.weight", ADAPTERS[adapter].0));
        }
    }
}
