//! A small valid adapter for tests that break it, and its model.

use std::collections::{BTreeMap, BTreeSet};

use lora_core::formats::{self, AdapterError, ReadOptions};
use lora_core::{Adapter, LoraConfig, ModelGeometry, Rejection};
use loramux_tests::{AdapterFiles, FileTensor};
use serde_json::{Value, json};

/// A query projection of layer 0.
pub const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// Dimensions of [`model`].
pub const HIDDEN: usize = 8;
pub const VOCAB: usize = 16;

/// The files of an adapter before they are written.
pub struct Draft(AdapterFiles);

/// A model of one layer and 8 features, without biases.
pub fn model() -> ModelGeometry {
    ModelGeometry {
        hidden: HIDDEN,
        intermediate: 12,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        vocab: VOCAB,
        num_experts: 0,
        moe_intermediate: 0,
        qk_norms: false,
        tied_embeddings: false,
        hf_modules: ModelGeometry::DENSE_MODULES.map(str::to_owned).to_vec(),
        biased_modules: BTreeSet::new(),
    }
}

impl Draft {
    /// A valid adapter of rank 2 on the query projection of [`model`].
    pub fn new() -> Self {
        let config = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4,
            "target_modules": ["q_proj"],
        });
        let mut draft = Self(AdapterFiles { config, tensors: BTreeMap::new() });
        draft.pair(Q, HIDDEN, HIDDEN);
        draft
    }

    /// A valid adapter with one change.
    pub fn with(change: impl FnOnce(&mut Self)) -> Self {
        let mut draft = Self::new();
        change(&mut draft);
        draft
    }

    /// Sets a field of the configuration.
    pub fn set(&mut self, field: &str, value: Value) {
        self.0.config[field] = value;
    }

    /// Adds a tensor of ones.
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.insert(name, FileTensor::filled(shape, 1.0));
    }

    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: impl Into<String>, tensor: FileTensor) {
        self.0.tensors.insert(name.into(), tensor);
    }

    /// Removes a tensor.
    pub fn remove(&mut self, name: &str) {
        self.0.tensors.remove(name);
    }

    /// Adds A and B of rank 2 for a linear module.
    pub fn pair(&mut self, module: &str, input: usize, output: usize) {
        self.add(format!("{module}.lora_A.weight"), &[2, input]);
        self.add(format!("{module}.lora_B.weight"), &[output, 2]);
    }

    /// Adds A and B of rank 2 for the embedding.
    pub fn embedding(&mut self) {
        self.add("base_model.model.model.embed_tokens.lora_embedding_A", &[2, VOCAB]);
        self.add("base_model.model.model.embed_tokens.lora_embedding_B", &[HIDDEN, 2]);
        self.set("target_modules", json!(["q_proj", "embed_tokens"]));
    }

    /// Renames every tensor.
    pub fn rename(&mut self, from: &str, to: &str) {
        self.0 = self.0.renamed(|name| name.replace(from, to));
    }

    /// Reads the files.
    pub fn load(&self, options: &ReadOptions) -> Result<Adapter, AdapterError> {
        let dir = tempfile::tempdir().unwrap();
        self.0.write(dir.path());
        formats::load(dir.path(), options)
    }

    /// The rejections of the files, without their path.
    pub fn refused(&self) -> Vec<Rejection> {
        self.refused_with(&ReadOptions::default())
    }

    /// [`Draft::refused`] under other options.
    pub fn refused_with(&self, options: &ReadOptions) -> Vec<Rejection> {
        let error = self.load(options).unwrap_err();
        error.rejections().unwrap_or_else(|| panic!("{error}")).0.clone()
    }

    /// The rejections of the adapter on a model.
    pub fn checked(&self, model: &ModelGeometry, config: &LoraConfig) -> Vec<Rejection> {
        self.load(&ReadOptions::default()).unwrap().check(model, config)
    }
}

#[test]
fn the_draft_breaks_no_rule_as_it_is() {
    assert_eq!(Draft::new().checked(&model(), &LoraConfig::default()), []);
}
