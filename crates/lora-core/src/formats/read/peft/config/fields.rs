//! The policy for each field of `adapter_config.json`.

use crate::formats::read::fields::Policy::{self, Applied, Harmless, Irrelevant, MustBeEmpty};

const PLAIN: &str = "train or convert the adapter as plain LoRA";

/// Every field that PEFT writes for LoRA, up to release 0.21.
///
/// Configurations of initialisation methods (`corda_config` and the like) are irrelevant: they take effect
/// only through `init_lora_weights`, which is checked.
pub(super) const FIELDS: &[(&str, Policy)] = &[
    ("peft_type", Applied),
    ("task_type", Applied),
    ("r", Applied),
    ("lora_alpha", Applied),
    ("rank_pattern", Applied),
    ("alpha_pattern", Applied),
    ("use_rslora", Applied),
    ("use_dora", Applied),
    ("lora_bias", Applied),
    ("bias", Applied),
    ("target_modules", Applied),
    ("target_parameters", Applied),
    ("exclude_modules", Applied),
    ("layers_to_transform", Applied),
    ("layers_pattern", Applied),
    ("modules_to_save", Applied),
    ("trainable_token_indices", Applied),
    ("init_lora_weights", Applied),
    ("ensure_weight_tying", Applied),
    ("base_model_name_or_path", Irrelevant),
    ("peft_version", Applied),
    ("auto_mapping", Irrelevant),
    ("revision", Irrelevant),
    ("inference_mode", Irrelevant),
    ("lora_dropout", Irrelevant),
    ("merge_weights", Irrelevant),
    ("megatron_core", Irrelevant),
    ("qalora_group_size", Irrelevant),
    ("runtime_config", Irrelevant),
    ("loftq_config", Irrelevant),
    ("corda_config", Irrelevant),
    ("eva_config", Irrelevant),
    ("lora_ga_config", Irrelevant),
    // PEFT resets it for `torch.nn.Linear`, and ignores it for embeddings.
    ("fan_in_fan_out", Harmless("it is for layers that store their weights transposed (Conv1D)")),
    ("enable_lora", MustBeEmpty(PLAIN)),
    ("megatron_config", MustBeEmpty("export the adapter without tensor parallelism")),
    ("layer_replication", MustBeEmpty("train the adapter on a model with the layers written out")),
    ("alora_invocation_tokens", MustBeEmpty("activated LoRA is not supported: train plain LoRA")),
    ("invocation_string", MustBeEmpty("activated LoRA is not supported: train plain LoRA")),
    ("use_qalora", MustBeEmpty(PLAIN)),
    ("kasa_config", MustBeEmpty(PLAIN)),
    ("velora_config", MustBeEmpty(PLAIN)),
    ("monteclora_config", MustBeEmpty(PLAIN)),
    ("arrow_config", MustBeEmpty(PLAIN)),
    ("use_bdlora", MustBeEmpty(PLAIN)),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_field_has_one_policy() {
        let names: BTreeSet<&str> = FIELDS.iter().map(|(name, _)| *name).collect();
        assert_eq!(names.len(), FIELDS.len());
    }
}
