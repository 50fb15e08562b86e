//! Valid adapters that do not fit a model or the configuration of an engine.

use lora_core::formats::{self, ReadOptions};
use lora_core::{CkptSource, Code, LoraConfig, ModelGeometry, Rejection};
use serde_json::json;

use loramux_tests::{FileTensor, adapter_path, geometry};

use crate::Case;
use crate::draft::{Draft, HIDDEN, Q, VOCAB, model};

/// The rejections of a changed adapter on the usual model.
fn on_model(change: impl FnOnce(&mut Draft)) -> Vec<Rejection> {
    Draft::with(change).checked(&model(), &LoraConfig::default())
}

/// The rejections of the usual adapter under a configuration.
fn under(config: &LoraConfig) -> Vec<Rejection> {
    Draft::new().checked(&model(), config)
}

pub const CASES: &[Case] = &[
    (Code::LayerOutOfRange, || {
        on_model(|d| d.pair(&Q.replace("layers.0", "layers.1"), HIDDEN, HIDDEN))
    }),
    (Code::RankOverLimit, || under(&LoraConfig { max_lora_rank: 1, ..LoraConfig::default() })),
    (Code::ModuleNotServed, || {
        let lora_target_modules = vec!["mlp_gate".to_owned()];
        under(&LoraConfig { lora_target_modules, ..LoraConfig::default() })
    }),
    (Code::ModuleNotInModel, || {
        on_model(|d| {
            d.pair("base_model.model.model.layers.0.mlp.shared_expert.up_proj", HIDDEN, 12);
            d.set("target_modules", json!(["q_proj", "shared_expert.up_proj"]));
        })
    }),
    (Code::ShapeMismatch, || on_model(|d| d.pair(Q, HIDDEN, HIDDEN + 4))),
    (Code::VocabularyMismatch, || {
        let model = ModelGeometry { vocab: VOCAB - 2, ..model() };
        Draft::with(Draft::embedding).checked(&model, &LoraConfig::default())
    }),
    (Code::TargetWithoutWeights, || {
        // The archive has weights for three layers, those of its own model.
        let model = ModelGeometry { layers: 4, ..geometry("llama") };
        let options = ReadOptions::default().with_source(CkptSource::Nemo).for_model(model);
        let error = formats::load(&adapter_path("llama.qkv-tied-nemo"), &options).unwrap_err();
        error.rejections().unwrap().0.clone()
    }),
    (Code::WeightsWithoutTarget, || {
        on_model(|d| d.pair(&Q.replace("q_proj", "o_proj"), HIDDEN, HIDDEN))
    }),
    (Code::NoopAdapter, || {
        let zero = FileTensor::filled(&[HIDDEN, 2], 0.0);
        on_model(|d| d.insert(format!("{Q}.lora_B.weight"), zero))
    }),
    (Code::TiedEmbeddings, || {
        let tied = |d: &mut Draft| {
            d.embedding();
            d.set("ensure_weight_tying", json!(true));
        };
        let model = ModelGeometry { tied_embeddings: true, ..model() };
        Draft::with(tied).checked(&model, &LoraConfig::default())
    }),
    (Code::BiasNotInModel, || {
        on_model(|d| {
            d.set("bias", json!("lora_only"));
            d.add(format!("{Q}.base_layer.bias"), &[HIDDEN]);
        })
    }),
];
