//! Models, adapters and expected outputs made by transformers and PEFT; see
//! `tests/fixtures/README.md`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lora_core::{
    CkptSource, DType, HostTensor, LoraConfig, LoraRequest, ModelGeometry, TargetModule,
};
use lora_cpu_ref::CpuRef;
use loramux_engine::{GenerateRequest, Llm, LlmBuilder, Prompt, RequestOutput, SamplingParams};
use serde::Deserialize;
use serde_json::Value;

/// One row of `cases.json`: a prompt and the expected result.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    /// Unique name, `model/adapter/number`.
    pub id: String,
    /// Folder under `models/`.
    pub model: String,
    /// Folder under `adapters/`; `None` is the base model.
    pub adapter: Option<String>,
    /// The case with the same logits, if the adapter is another one in a different container.
    #[serde(default)]
    pub logits_of: Option<String>,
    /// Token ids.
    pub prompt: Vec<u32>,
    /// The greedy continuation.
    pub greedy: Vec<u32>,
    /// Best minus second-best logit at each token of the continuation.
    pub margin: Vec<f32>,
}

/// All fixtures.
pub struct Fixtures {
    /// The cases.
    pub cases: Vec<Case>,
    logits: Vec<u8>,
}

/// The folder of the fixtures: that of the checkout, unless `LORAMUX_FIXTURES` names another, for test
/// binaries that run elsewhere.
pub fn fixtures_dir() -> PathBuf {
    let checkout = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    std::env::var_os("LORAMUX_FIXTURES").map_or_else(checkout, PathBuf::from)
}

/// The folder of a fixture model.
pub fn model_path(name: &str) -> PathBuf {
    fixtures_dir().join("models").join(name)
}

/// The folder of a fixture adapter.
pub fn adapter_path(name: &str) -> PathBuf {
    fixtures_dir().join("adapters").join(name)
}

/// The format of a fixture adapter.
pub fn ckpt_source(name: &str) -> CkptSource {
    if name.ends_with("-nemo") { CkptSource::Nemo } else { CkptSource::Hf }
}

/// The dimensions of a fixture model, dense or with routed experts.
///
/// # Panics
/// If its configuration cannot be read: the checkout is broken.
pub fn geometry(model: &str) -> ModelGeometry {
    let config = std::fs::read(model_path(model).join("config.json")).expect("a fixture model");
    let config: Value = serde_json::from_slice(&config).expect("config.json");
    let known = |name: &str| config[name].as_u64().map(|size| size as usize);
    let size = |name: &str| known(name).expect("a size");
    let heads = size("num_attention_heads");
    let experts = known("num_experts").or(known("num_local_experts")).unwrap_or(0);
    let modules = match experts {
        0 => ModelGeometry::DENSE_MODULES.to_vec(),
        // The modules of attention; routed experts are described by their number and size.
        _ => [&ModelGeometry::DENSE_MODULES[..4], &["mlp.gate"]].concat(),
    };
    ModelGeometry {
        hidden: size("hidden_size"),
        intermediate: size("intermediate_size"),
        layers: size("num_hidden_layers"),
        heads,
        kv_heads: size("num_key_value_heads"),
        head_dim: known("head_dim").unwrap_or(size("hidden_size") / heads),
        vocab: size("vocab_size"),
        num_experts: experts,
        moe_intermediate: match experts {
            0 => 0,
            _ => known("moe_intermediate_size").unwrap_or(size("intermediate_size")),
        },
        qk_norms: config["model_type"].as_str().is_some_and(|kind| kind.starts_with("qwen3")),
        tied_embeddings: config["tie_word_embeddings"].as_bool().expect("a flag"),
        hf_modules: modules.into_iter().map(str::to_owned).collect(),
        biased_modules: match config["model_type"].as_str() {
            Some("qwen2") => [TargetModule::AttnQ, TargetModule::AttnK, TargetModule::AttnV].into(),
            _ => BTreeSet::new(),
        },
    }
}

impl Fixtures {
    /// Reads the fixtures.
    ///
    /// # Panics
    /// If they are not there: the checkout is broken.
    pub fn load() -> Self {
        let read = |name| std::fs::read(fixtures_dir().join(name)).expect("a fixture file");
        let cases = serde_json::from_slice(&read("cases.json")).expect("cases.json");
        Self { cases, logits: read("logits.safetensors") }
    }

    /// Cases of one model.
    pub fn of_model(&self, model: &str) -> Vec<Case> {
        self.cases.iter().filter(|c| c.model == model).cloned().collect()
    }

    /// The expected logits of a case: `[prompt tokens, vocab]`.
    ///
    /// # Panics
    /// If the case has none: the checkout is broken.
    pub fn logits(&self, case: &Case) -> Vec<f32> {
        let file = safetensors::SafeTensors::deserialize(&self.logits).expect("logits");
        let id = case.logits_of.as_ref().unwrap_or(&case.id);
        let tensor = file.tensor(id).expect("logits of a case");
        let data = tensor.data().to_vec();
        HostTensor::new(DType::F32, tensor.shape().to_vec(), data).expect("f32").to_f32()
    }
}

impl Case {
    /// The request that the case describes: greedy past any end token, logits of the prompt.
    pub fn request(&self, lora_id: i64) -> GenerateRequest {
        let lora = self.adapter.as_ref().map(|name| {
            LoraRequest::new(name.clone(), lora_id, adapter_path(name))
                .with_ckpt_source(ckpt_source(name))
        });
        GenerateRequest {
            prompt: Prompt::Ids(self.prompt.clone()),
            sampling: SamplingParams {
                max_tokens: Some(self.greedy.len()),
                ignore_eos: true,
                return_context_logits: true,
                return_generation_logits: true,
                ..SamplingParams::default()
            },
            lora,
        }
    }

    /// Requests of many cases; each adapter gets one id.
    pub fn requests(cases: &[Self]) -> Vec<GenerateRequest> {
        let mut names: Vec<_> = cases.iter().map(|c| c.adapter.clone()).collect();
        names.sort_unstable();
        names.dedup();
        let id = |case: &Self| names.iter().position(|n| *n == case.adapter).unwrap_or(0) as i64;
        cases.iter().map(|case| case.request(id(case))).collect()
    }
}

/// Settings for an engine over a model, with room for every adapter of the fixtures at once.
pub fn builder(model: &Path, dtype: DType) -> LlmBuilder {
    Llm::builder(model)
        .dtype(Some(dtype))
        .lora_config(LoraConfig { max_loras: Some(16), ..LoraConfig::default() })
}

/// An engine over a fixture model on the CPU, with room for every adapter at once.
///
/// # Panics
/// If it cannot start.
pub fn engine(model: &str, dtype: DType) -> Llm {
    builder(&model_path(model), dtype)
        .build(|| CpuRef::with_threads(None))
        .expect("the fixture model loads")
}

/// Runs requests and unwraps their answers.
///
/// # Panics
/// If one fails.
pub fn run(llm: &Llm, requests: Vec<GenerateRequest>) -> Vec<RequestOutput> {
    let answers = llm.generate_each(requests, &mut |_| ());
    answers.into_iter().map(|a| a.unwrap_or_else(|e| panic!("{e}"))).collect()
}
