//! Adapters that are refused because of their files.

use lora_core::formats::ReadOptions;
use lora_core::{Code, ExpertLayout};
use loramux_tests::FileTensor;
use safetensors::tensor::Dtype;
use serde_json::json;

use crate::Case;
use crate::draft::{Draft, HIDDEN, Q};

/// The routed experts of layer 0.
const EXPERTS: &str = "base_model.model.model.layers.0.mlp.experts";

pub const CASES: &[Case] = &[
    (Code::UnsupportedPeftType, || Draft::with(|d| d.set("peft_type", json!("LOHA"))).refused()),
    (Code::UnsupportedConfigField, || {
        Draft::with(|d| d.set("layer_replication", json!([[0, 1]]))).refused()
    }),
    (Code::UnknownConfigField, || {
        Draft::with(|d| d.set("brand_new", json!({"strength": 2}))).refused()
    }),
    (Code::MissingConfigField, || Draft::with(|d| d.set("r", json!(null))).refused()),
    (Code::InvalidConfigField, || Draft::with(|d| d.set("lora_alpha", json!("16"))).refused()),
    (Code::InvalidPattern, || {
        Draft::with(|d| d.set("target_modules", json!("(?<layer>.*)q_proj"))).refused()
    }),
    (Code::PatternTooComplex, || {
        // It backtracks over every way to split the name into runs of letters.
        let pattern = r"((?!_)\w+\.?)+!";
        Draft::with(|d| d.set("alpha_pattern", json!({pattern: 2}))).refused()
    }),
    (Code::MutatedBaseWeights, || {
        Draft::with(|d| d.set("init_lora_weights", json!("pissa"))).refused()
    }),
    (Code::UnknownTensor, || Draft::with(|d| d.add("optimizer.step", &[1])).refused()),
    (Code::WrappedNames, || {
        Draft::with(|d| d.rename("base_model.model.", "base_model.model._orig_mod.")).refused()
    }),
    (Code::MultimodalNames, || {
        Draft::with(|d| d.rename("model.layers", "model.language_model.layers")).refused()
    }),
    (Code::ForeignNames, || {
        let mlx = |d: &mut Draft| {
            d.rename("base_model.model.", "");
            d.rename("lora_A.weight", "lora_a");
            d.rename("lora_B.weight", "lora_b");
        };
        Draft::with(mlx).refused()
    }),
    (Code::PartitionedTensors, || Draft::with(|d| d.pair(Q, 0, 0)).refused()),
    (Code::UnknownModule, || {
        let norm = "base_model.model.model.layers.0.input_layernorm.lora_A.weight";
        Draft::with(|d| d.add(norm, &[2, HIDDEN])).refused()
    }),
    (Code::DuplicateTensor, || {
        let other = FileTensor::filled(&[2, HIDDEN], 0.25);
        Draft::with(|d| d.insert(format!("{Q}.lora_A.default.weight"), other)).refused()
    }),
    (Code::SeveralAdapters, || {
        let second = Q.replace("layers.0", "layers.1");
        let two = |d: &mut Draft| {
            d.rename(".weight", ".sql.weight");
            d.add(format!("{second}.lora_A.pirate.weight"), &[2, HIDDEN]);
            d.add(format!("{second}.lora_B.pirate.weight"), &[HIDDEN, 2]);
        };
        Draft::with(two).refused()
    }),
    (Code::RoutedExpertLayout, || {
        let experts = &format!("{EXPERTS}.0.up_proj");
        let options =
            ReadOptions { moe_layout: Some(ExpertLayout::Stacked), ..ReadOptions::default() };
        Draft::with(|d| d.pair(experts, HIDDEN, 12)).refused_with(&options)
    }),
    (Code::AmbiguousExpertLayout, || {
        let parameters = |d: &mut Draft| {
            d.pair(EXPERTS, HIDDEN, HIDDEN);
            d.set("target_parameters", json!(["mlp.experts.down_proj"]));
        };
        Draft::with(parameters).refused()
    }),
    (Code::ExpertRankMismatch, || {
        let unequal = |d: &mut Draft| {
            d.pair(&format!("{EXPERTS}.0.up_proj"), HIDDEN, 12);
            d.pair(&format!("{EXPERTS}.1.up_proj"), HIDDEN, 12);
            d.set("alpha_pattern", json!({"experts.1.up_proj": 6}));
        };
        Draft::with(unequal).refused()
    }),
    (Code::MissingExperts, || {
        let gap = |d: &mut Draft| {
            d.pair(&format!("{EXPERTS}.0.up_proj"), HIDDEN, 12);
            d.pair(&format!("{EXPERTS}.3.up_proj"), HIDDEN, 12);
        };
        Draft::with(gap).refused()
    }),
    (Code::DoraOnExperts, || {
        let dora = |d: &mut Draft| {
            d.add(format!("{Q}.lora_magnitude_vector"), &[HIDDEN]);
            d.pair(&format!("{EXPERTS}.0.up_proj"), HIDDEN, 12);
            d.pair(&format!("{EXPERTS}.1.up_proj"), HIDDEN, 12);
            d.set("use_dora", json!(true));
        };
        Draft::with(dora).refused()
    }),
    (Code::IncompletePair, || Draft::with(|d| d.remove(&format!("{Q}.lora_B.weight"))).refused()),
    (Code::TensorShape, || {
        Draft::with(|d| d.add(format!("{Q}.lora_A.weight"), &[2 * HIDDEN])).refused()
    }),
    (Code::TensorDtype, || {
        let data = vec![0; 2 * HIDDEN];
        let tensor = FileTensor { dtype: Dtype::I8, shape: vec![2, HIDDEN], data };
        Draft::with(|d| d.insert(format!("{Q}.lora_A.weight"), tensor)).refused()
    }),
    (Code::NonFinite, || {
        let tensor = FileTensor::filled(&[HIDDEN, 2], f32::NAN);
        Draft::with(|d| d.insert(format!("{Q}.lora_B.weight"), tensor)).refused()
    }),
    (Code::RankMismatch, || Draft::with(|d| d.set("rank_pattern", json!({"q_proj": 4}))).refused()),
    (Code::UndeclaredTensor, || {
        Draft::with(|d| d.add(format!("{Q}.base_layer.bias"), &[HIDDEN])).refused()
    }),
    (Code::MissingTensor, || {
        Draft::with(|d| d.set("modules_to_save", json!(["lm_head"]))).refused()
    }),
    (Code::LoraBiasOnEmbedding, || {
        let bias = |d: &mut Draft| {
            d.set("lora_bias", json!(true));
            d.add(format!("{Q}.lora_B.bias"), &[HIDDEN]);
            d.embedding();
        };
        Draft::with(bias).refused()
    }),
];
