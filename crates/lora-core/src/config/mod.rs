//! LoRA configuration, with TensorRT-LLM's field names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::geometry::ModelGeometry;
use crate::modules::{FUSED, HfNames, ModuleMap, TargetModule, unknown_target};
use crate::rules::{Code, Rejection};

mod adapter_tokenizer;
mod cache;
mod expert_layout;
mod quant;
mod request;

pub use adapter_tokenizer::AdapterTokenizer;
pub use cache::PeftCacheConfig;
pub use expert_layout::ExpertLayout;
pub use quant::{QuantAlgo, QuantConfig};
pub use request::{CkptSource, LoraRequest, validate_adapter_name};

/// Row order of the fused query/key/value projection in a NeMo adapter.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NemoQkvLayout {
    /// Megatron's order: for each KV head its query heads, the key head, the value head.
    #[default]
    Interleaved,
    /// All query heads, then all key heads, then all value heads.
    Concatenated,
}

/// Limits and options for the adapters of an engine.
///
/// Fields up to `cuda_graph_specialize_lora` have TensorRT-LLM's names, defaults and meaning; the others are
/// this project's. Unknown fields are refused.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// At most one adapter directory. If `lora_target_modules` is empty, the modules of this adapter are the
    /// targets. The adapter is not registered by this.
    pub lora_dir: Vec<PathBuf>,
    /// Format of `lora_dir`.
    pub lora_ckpt_source: CkptSource,
    /// Largest rank that any module of an adapter may have.
    pub max_lora_rank: usize,
    /// Names of the [`TargetModule`]s that adapters may change; for an empty list see
    /// [`LoraConfig::effective_targets`].
    pub lora_target_modules: Vec<String>,
    /// Replaces the default [`ModuleMap`] if it is not empty.
    pub trtllm_modules_to_hf_modules: BTreeMap<String, HfNames>,
    /// Capacity of the device tier, in adapters of maximum size; overrides [`PeftCacheConfig`].
    pub max_loras: Option<usize>,
    /// Capacity of the host tier, in adapters of maximum size; overrides [`PeftCacheConfig`].
    pub max_cpu_loras: Option<usize>,
    /// Whether the gate rows of a fused `gate_up_proj` come first, as in most Hugging Face models; if
    /// false, the up rows do, as in Phi-4-multimodal.
    pub swap_gate_up_proj_lora_b_weight: bool,
    /// Hint that LoRA may run concurrently with the base layer; does not affect results.
    pub overlap_lora_and_base: bool,
    /// Hint that batches without LoRA may have separate CUDA graphs; does not affect results.
    pub cuda_graph_specialize_lora: bool,
    /// Ignore unknown fields of `adapter_config.json` instead of refusing them.
    pub allow_unknown_fields: bool,
    /// Accept adapters that have no effect.
    pub allow_noop_adapter: bool,
    /// Treat experts without weights as unchanged instead of refusing the adapter.
    pub allow_missing_experts: bool,
    /// Layout of routed-expert tensors; detected if `None`.
    pub moe_layout: Option<ExpertLayout>,
    /// Row order of fused query/key/value projections in NeMo adapters.
    pub nemo_qkv_layout: NemoQkvLayout,
    /// Whether requests for an adapter use the tokenizer, chat template and end tokens in its folder.
    pub adapter_tokenizer: AdapterTokenizer,
    /// How many later requests for resident adapters may overtake a request that waits for its adapter.
    pub adapter_fairness_window: usize,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            lora_dir: Vec::new(),
            lora_ckpt_source: CkptSource::Hf,
            max_lora_rank: 64,
            lora_target_modules: Vec::new(),
            trtllm_modules_to_hf_modules: BTreeMap::new(),
            max_loras: None,
            max_cpu_loras: None,
            swap_gate_up_proj_lora_b_weight: true,
            overlap_lora_and_base: false,
            cuda_graph_specialize_lora: false,
            allow_unknown_fields: false,
            allow_noop_adapter: false,
            allow_missing_experts: false,
            moe_layout: None,
            nemo_qkv_layout: NemoQkvLayout::default(),
            adapter_tokenizer: AdapterTokenizer::default(),
            adapter_fairness_window: 32,
        }
    }
}

/// Query, key and value are targeted together: if one of them is a target, all are.
const TRIOS: [[TargetModule; 3]; 2] = [
    [TargetModule::AttnQ, TargetModule::AttnK, TargetModule::AttnV],
    [TargetModule::CrossAttnQ, TargetModule::CrossAttnK, TargetModule::CrossAttnV],
];

impl LoraConfig {
    /// The rules that the values break, irrespective of a model; empty if they are valid.
    pub fn validate(&self) -> Vec<Rejection> {
        let mut problems: Vec<Rejection> = self
            .lora_target_modules
            .iter()
            .filter(|name| TargetModule::from_name(name).is_none())
            .map(|name| unknown_target("lora_target_modules", name))
            .collect();
        if let Err(rejections) = ModuleMap::from_user(&self.trtllm_modules_to_hf_modules) {
            problems.extend(rejections.0);
        }
        let counts = [
            ("max_lora_rank", Some(self.max_lora_rank), MAX_RANK),
            ("max_loras", self.max_loras, MAX_SLOTS),
            ("max_cpu_loras", self.max_cpu_loras, MAX_HOST_ADAPTERS),
        ];
        problems.extend(counts.into_iter().filter_map(|(s, count, most)| counted(s, count?, most)));
        if self.lora_dir.len() > 1 {
            problems.push(several_dirs(self.lora_dir.len()));
        }
        problems
    }

    /// The modules that adapters may change on this model.
    ///
    /// With an empty list, these are all modules of the model. Otherwise they are the listed modules,
    /// query, key and value together if one of them is listed, and the parts of a fused module that the
    /// model does not fuse. Unknown names are ignored here; [`LoraConfig::validate`] reports them.
    pub fn effective_targets(&self, model: &ModelGeometry) -> BTreeSet<TargetModule> {
        let present = model.modules();
        if self.lora_target_modules.is_empty() {
            return present;
        }
        let mut targets: BTreeSet<TargetModule> =
            self.lora_target_modules.iter().filter_map(|n| TargetModule::from_name(n)).collect();
        for (fused, parts) in FUSED {
            if targets.contains(&fused) && !present.contains(&fused) {
                targets.extend(parts);
            }
        }
        for trio in TRIOS {
            if trio.iter().any(|module| targets.contains(module)) {
                targets.extend(trio);
            }
        }
        targets
    }

    /// Elements of a rank-1 adapter of one layer, for each module that adapters may change: its input and
    /// output features.
    pub fn rank_one_widths(&self, model: &ModelGeometry) -> impl Iterator<Item = usize> {
        let targets = self.effective_targets(model);
        let dims: Vec<_> = targets.iter().filter_map(|module| model.dims(*module)).collect();
        dims.into_iter().map(|(inputs, outputs)| inputs + outputs)
    }
}

/// Maximum of `max_lora_rank`. Layers have fewer outputs, and a higher rank would be useless.
const MAX_RANK: usize = 1 << 16;

/// Maximum number of device slots. Each takes memory at every site, used or not. Whether they fit into the
/// memory of the machine is checked later.
const MAX_SLOTS: usize = 1 << 16;

/// Maximum number of adapters in the host tier. The bookkeeping for so many takes some hundred megabytes.
const MAX_HOST_ADAPTERS: usize = 1 << 20;

/// The rejection of a count that is not in 1 to `most`.
fn counted(setting: &str, count: usize, most: usize) -> Option<Rejection> {
    let remedy = match count {
        0 => "raise it or leave it out",
        _ => "lower it or leave it out",
    };
    let refused = || {
        let (found, allowed) = (count.to_string(), format!("a whole number of 1 to {most}"));
        Rejection::new(Code::SettingOutOfRange, setting, found, allowed, remedy)
    };
    (!(1..=most).contains(&count)).then(refused)
}

fn several_dirs(count: usize) -> Rejection {
    Rejection::new(
        Code::SeveralLoraDirs,
        "lora_dir",
        format!("{count} entries"),
        "at most one",
        "keep one directory and name the other adapters in requests",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(modules: &[&str]) -> ModelGeometry {
        ModelGeometry {
            hidden: 64,
            intermediate: 176,
            layers: 3,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocab: 512,
            num_experts: 0,
            moe_intermediate: 0,
            qk_norms: false,
            tied_embeddings: false,
            hf_modules: modules.iter().map(ToString::to_string).collect(),
            biased_modules: BTreeSet::new(),
        }
    }

    #[test]
    fn the_fields_of_the_original_are_read_and_others_refused() {
        let config: LoraConfig = serde_json::from_str(
            r#"{"lora_target_modules": ["attn_q"], "max_lora_rank": 8, "max_loras": 4,
                "trtllm_modules_to_hf_modules": {"attn_q": ["q_proj", "wq"]},
                "lora_ckpt_source": "nemo", "nemo_qkv_layout": "concatenated",
                "adapter_tokenizer": "base"}"#,
        )
        .unwrap();
        assert_eq!(config.adapter_tokenizer, AdapterTokenizer::Base);
        assert!(serde_json::from_str::<LoraConfig>(r#"{"adapter_tokenizer": "own"}"#).is_err());
        assert_eq!((config.max_loras, config.max_cpu_loras), (Some(4), None));
        assert!(config.validate().is_empty());
        assert!(serde_json::from_str::<LoraConfig>(r#"{"max_rank": 8}"#).is_err());
        assert_eq!(LoraConfig::default().max_lora_rank, 64);
    }

    #[test]
    fn every_problem_of_a_config_is_told() {
        let config = LoraConfig {
            lora_dir: vec!["a".into(), "b".into()],
            max_lora_rank: 0,
            max_loras: Some(0),
            lora_target_modules: vec!["attn_q".into(), "q_proj".into()],
            ..LoraConfig::default()
        };
        let codes: Vec<Code> = config.validate().iter().map(|r| r.code).collect();
        use Code::*;
        assert_eq!(
            codes,
            [UnknownTargetModule, SettingOutOfRange, SettingOutOfRange, SeveralLoraDirs]
        );
    }

    #[test]
    fn counts_have_an_upper_bound_that_is_told() {
        let config = LoraConfig {
            max_lora_rank: usize::MAX,
            max_loras: Some(1 << 20),
            max_cpu_loras: Some(usize::MAX),
            ..LoraConfig::default()
        };
        let problems = config.validate();
        let bounds = ["65536", "65536", "1048576"];
        assert_eq!(problems.len(), bounds.len());
        for (problem, bound) in problems.iter().zip(bounds) {
            assert_eq!(problem.code, Code::SettingOutOfRange);
            assert!(problem.to_string().contains(bound), "{problem}");
        }
        let largest = LoraConfig {
            max_lora_rank: MAX_RANK,
            max_loras: Some(MAX_SLOTS),
            max_cpu_loras: Some(MAX_HOST_ADAPTERS),
            ..LoraConfig::default()
        };
        assert!(largest.validate().is_empty());
    }

    #[test]
    fn targets_complete_the_trio_and_default_to_the_models_modules() {
        let dense = model(&ModelGeometry::DENSE_MODULES);
        let names = |list: &[&str]| {
            let config = LoraConfig {
                lora_target_modules: list.iter().map(ToString::to_string).collect(),
                ..LoraConfig::default()
            };
            config.effective_targets(&dense).iter().map(|m| m.name()).collect::<Vec<_>>()
        };
        assert_eq!(names(&["attn_v", "attn_dense"]), ["attn_q", "attn_k", "attn_v", "attn_dense"]);
        assert_eq!(names(&["mlp_gate_up"]), ["mlp_h_to_4h", "mlp_gate", "mlp_gate_up"]);
        assert_eq!(names(&["attn_qkv"]).len(), 4);
        assert_eq!(names(&[]).len(), 7);
    }
}
