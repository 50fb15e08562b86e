//! The dimensions of a model that adapters have to match.

use std::collections::BTreeSet;

use lora_core::{ModelGeometry, TargetModule};

use crate::model::ModelConfig;

/// The dimensions of a model that adapters have to match.
pub fn geometry(config: &ModelConfig) -> ModelGeometry {
    ModelGeometry {
        hidden: config.hidden,
        intermediate: config.intermediate,
        layers: config.layers,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        vocab: config.vocab,
        num_experts: 0,
        moe_intermediate: 0,
        qk_norms: config.qk_norm,
        tied_embeddings: config.tied_embeddings,
        hf_modules: ModelGeometry::DENSE_MODULES.map(str::to_owned).to_vec(),
        biased_modules: biased_modules(config),
    }
}

fn biased_modules(config: &ModelConfig) -> BTreeSet<TargetModule> {
    use TargetModule::{AttnDense, AttnK, AttnQ, AttnV, Mlp4hToH, MlpGate, MlpHTo4h};
    let groups = [
        (config.biases.qkv, &[AttnQ, AttnK, AttnV][..]),
        (config.biases.o, &[AttnDense]),
        (config.biases.mlp, &[MlpHTo4h, MlpGate, Mlp4hToH]),
    ];
    groups.into_iter().filter(|(has, _)| *has).flat_map(|(_, modules)| modules).copied().collect()
}
