//! Recognises files of other programs by their tensor names.
//!
//! All names of such a file follow one scheme, so each origin is reported once, with a count.

use std::collections::BTreeMap;

use crate::formats::RawTensor;
use crate::rules::{Code, Rejection};

/// Wrapper modules, and their origin.
const WRAPPERS: [(&str, &str); 7] = [
    ("_orig_mod", "a model that torch.compile wrapped"),
    ("module", "a model that DistributedDataParallel, DataParallel or DeepSpeed wrapped"),
    ("_fsdp_wrapped_module", "a model that FSDP wrapped"),
    ("_fpw_module", "a model that FSDP wrapped"),
    ("_flat_param", "a model that FSDP wrapped, its tensors flattened"),
    ("_checkpoint_wrapped_module", "a model that activation checkpointing wrapped"),
    ("_forward_module", "a model that Lightning wrapped"),
];

/// Parts of multimodal models.
const MULTIMODAL: [&str; 9] = [
    "language_model",
    "vision_tower",
    "vision_model",
    "visual",
    "multi_modal_projector",
    "mm_projector",
    "audio_tower",
    "thinker",
    "talker",
];

/// Megatron's linear layers.
const MEGATRON: [&str; 4] = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"];

/// Parts of names that kohya and diffusers use.
const IMAGE_MODEL: [&str; 6] =
    [".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", "lora_unet_", "unet."];

const PEFT_ROOT: &str = "base_model.model.";
const ALLOWED: &str = "names as PEFT writes them, such as \
                       base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

/// Origin of a name other than PEFT's `save_pretrained` of a language model.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Origin<'a> {
    /// A wrapper: its prefix with the dot, and its description.
    Wrapper(String, &'static str),
    /// A part of a multimodal model.
    Multimodal(&'a str),
    /// MLX: `lora_a` is `[in, rank]`.
    Mlx,
    Torchtune,
    /// Modules of Megatron, as in files of Megatron-Bridge and NeMo 2.
    Megatron,
    /// A LoRA of an image model (kohya, diffusers).
    ImageModel,
}

/// One rejection for each foreign origin.
pub(super) fn check(tensors: &BTreeMap<String, RawTensor>) -> Vec<Rejection> {
    let mut found: BTreeMap<Origin<'_>, (&str, usize)> = BTreeMap::new();
    for name in tensors.keys() {
        if let Some(origin) = origin(name) {
            found.entry(origin).or_insert((name, 0)).1 += 1;
        }
    }
    let mut problems: Vec<Rejection> = found
        .into_iter()
        .map(|(origin, (first, count))| origin.rejection(first, count, tensors.len()))
        .collect();
    problems.extend(partitioned(tensors));
    problems
}

fn origin(name: &str) -> Option<Origin<'_>> {
    let place = place(name);
    let ends = |tails: [&str; 2]| tails.iter().any(|tail| name.ends_with(tail));
    wrapper(place).or_else(|| multimodal(place)).or_else(|| match () {
        () if ends([".lora_a", ".lora_b"]) => Some(Origin::Mlx),
        () if ends([".lora_a.weight", ".lora_b.weight"]) => Some(Origin::Torchtune),
        () if place.split('.').any(|part| MEGATRON.contains(&part)) => Some(Origin::Megatron),
        () if IMAGE_MODEL.iter().any(|part| name.contains(part)) => Some(Origin::ImageModel),
        () => None,
    })
}

/// The module part of a name. What follows may contain the name of the adapter, which is arbitrary.
fn place(name: &str) -> &str {
    let kinds = [".lora_", ".modules_to_save", ".original_module"];
    let end = kinds.iter().filter_map(|kind| name.find(kind)).min();
    &name[..end.unwrap_or(name.len())]
}

fn wrapper(place: &str) -> Option<Origin<'_>> {
    let known = |part: &str| WRAPPERS.iter().find(|(wrapper, _)| *wrapper == part);
    if let Some((wrapper, by)) = place.split('.').find_map(known) {
        return Some(Origin::Wrapper(format!("{wrapper}."), by));
    }
    let (before, _) = place.rsplit_once(PEFT_ROOT).filter(|(before, _)| before.ends_with('.'))?;
    Some(Origin::Wrapper(before.to_owned(), "a model that another one wraps"))
}

fn multimodal(place: &str) -> Option<Origin<'_>> {
    place.split('.').find(|part| MULTIMODAL.contains(part)).map(Origin::Multimodal)
}

impl Origin<'_> {
    fn rejection(&self, first: &str, count: usize, all: usize) -> Rejection {
        let (code, what, remedy) = match self {
            Self::Wrapper(prefix, by) => (
                Code::WrappedNames,
                format!("the prefix `{prefix}`, of {by}"),
                "save the adapter from the model inside, as accelerate's unwrap_model gives it, \
                 with PEFT's save_pretrained",
            ),
            Self::Multimodal(part) => (
                Code::MultimodalNames,
                format!("`{part}`, a part of a multimodal (vision-language or audio) model"),
                "train the adapter on the text model, or serve it where the multimodal model runs",
            ),
            Self::Mlx => (
                Code::ForeignNames,
                "the names of Apple's MLX, whose matrices are transposed".to_owned(),
                "transpose lora_a and lora_b and write them under PEFT's names, with alpha = scale \
                 * rank; renaming the file is not enough",
            ),
            Self::Torchtune => (
                Code::ForeignNames,
                "torchtune's own names".to_owned(),
                "save it with torchtune's save_adapter_weights_only and the output format of PEFT",
            ),
            Self::Megatron => (
                Code::ForeignNames,
                "the names of Megatron's modules".to_owned(),
                "export the adapter to PEFT's format by the program that wrote it",
            ),
            Self::ImageModel => (
                Code::ForeignNames,
                "the names of a LoRA of an image model (kohya, diffusers)".to_owned(),
                "serve it on the image model",
            ),
        };
        Rejection::new(code, first, format!("{what}, in {count} of {all} names"), ALLOWED, remedy)
    }
}

/// Without gathering parameters, DeepSpeed ZeRO stage 3 saves empty tensors.
fn partitioned(tensors: &BTreeMap<String, RawTensor>) -> Option<Rejection> {
    let (first, _) = tensors.first_key_value()?;
    let empty = |tensor: &RawTensor| tensor.shape().contains(&0);
    tensors.values().all(empty).then(|| {
        Rejection::new(
            Code::PartitionedTensors,
            first,
            format!("no elements in any of {} tensors", tensors.len()),
            "whole tensors",
            "gather the parameters when saving: stage3_gather_16bit_weights_on_model_save of \
             DeepSpeed, or FULL_STATE_DICT of FSDP",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_peft_have_no_other_origin() {
        for name in [
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.module.weight",
            "base_model.model.lm_head.modules_to_save.visual.weight",
            "base_model.model.lm_head.modules_to_save.weight",
            "model.layers.0.mlp.up_proj.base_layer.weight",
            "base_model.model.model.layers.3.mlp.experts.base_layer.lora_A.weight",
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "",
            ".",
        ] {
            assert_eq!(origin(name), None, "{name}");
        }
    }

    #[test]
    fn wrappers_are_named_with_their_prefix_wherever_it_stands() {
        for (name, prefix) in [
            ("_orig_mod.base_model.model.model.layers.0.q.lora_A.weight", "_orig_mod."),
            ("base_model.model._orig_mod.model.layers.0.q.lora_A.weight", "_orig_mod."),
            ("base_model.model.model.layers.0._orig_mod.q.lora_A.weight", "_orig_mod."),
            ("module.base_model.model.model.layers.0.q.lora_A.weight", "module."),
            ("base_model.model.module.model.layers.0.q.lora_A.weight", "module."),
            ("_fsdp_wrapped_module.base_model.model.lm_head.weight", "_fsdp_wrapped_module."),
            (
                "base_model.model.model.layers.0._checkpoint_wrapped_module.q.lora_A.weight",
                "_checkpoint_wrapped_module.",
            ),
            ("base_model.model._fsdp_wrapped_module._flat_param", "_fsdp_wrapped_module."),
            ("state.model.base_model.model.model.layers.0.q.lora_A.weight", "state.model."),
            ("base_model.model.base_model.model.lm_head.lora_A.weight", "base_model.model."),
        ] {
            assert!(matches!(origin(name), Some(Origin::Wrapper(p, _)) if p == prefix), "{name}");
        }
    }

    #[test]
    fn other_programs_are_told_by_their_names() {
        for (name, expected) in [
            ("model.language_model.layers.0.q.lora_A.weight", Origin::Multimodal("language_model")),
            ("base_model.model.visual.blocks.0.qkv.lora_A.weight", Origin::Multimodal("visual")),
            ("model.layers.0.self_attn.q_proj.lora_a", Origin::Mlx),
            ("layers.0.attn.q_proj.lora_a.weight", Origin::Torchtune),
            (
                "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",
                Origin::Megatron,
            ),
            ("lora_unet_down_blocks_0_attn.lora_down.weight", Origin::ImageModel),
            ("unet.down_blocks.0.attn.to_q.lora_A.weight", Origin::ImageModel),
        ] {
            assert_eq!(origin(name), Some(expected), "{name}");
        }
    }
}
