//! The CUDA backend: the provider suite, the fixtures end to end, and a full device. Needs a GPU.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod faults;

use std::io::Write;
use std::path::PathBuf;

use lora_core::{DType, LoraConfig};
use lora_cuda::Cuda;
use loramux::model_fetch::{MODEL_FILE, cached_model_path};
use loramux_engine::{KvCacheConfig, Llm, RequestOutput};
use loramux_tests::suite::Types;
use loramux_tests::suite::errors::{self, ModelErrors};
use loramux_tests::{
    Case, Class, DemoCase, FieldAnswers, Fixtures, backend_suite, builder, demo_adapters,
    dense_field_cases, field_model, fixture_models, model_path, run,
};

/// A device that checks indices, as the provider suite requires.
fn device() -> Cuda {
    match Cuda::new(0) {
        Ok(cuda) => cuda.checked(),
        Err(error) => panic!("{error}"),
    }
}

backend_suite!(suite_f32, device(), Types::F32);
backend_suite!(suite_bf16, device(), Types::BF16);
backend_suite!(suite_f16, device(), Types::F16);
backend_suite!(suite_wide, device(), Types::WIDE);
backend_suite!(suite_mixed, device(), Types::MIXED);
backend_suite!(suite_fp8_kv, device(), Types::FP8_KV);

const BF16: Class = Class { dtype: DType::Bf16, logits: 1e-1, tie: 0.05 };

/// Tolerance for bf16 inputs that are rounded to e4m3, which sometimes gives the neighbouring code, an eighth away.
const FP8: Class = Class { dtype: DType::Bf16, logits: 2e-1, tie: 0.1 };

/// Every case alone and all in one batch: logits and tokens equal those of transformers and PEFT.
fn model_meets(model: &str, class: &Class) {
    let fixtures = Fixtures::load();
    let cases = fixtures.of_model(model);
    assert!(cases.len() >= 9, "{model} has {} cases", cases.len());
    let llm = builder(&model_path(model), class.dtype)
        .build(|| Cuda::new(0).map_err(Into::into))
        .expect("the fixture model loads");
    let requests = Case::requests(&cases);
    let one_by_one = || -> Vec<RequestOutput> {
        requests.iter().flat_map(|request| run(&llm, vec![request.clone()])).collect()
    };
    // From the second run on, prompts hit the prefix cache.
    let (_, alone, again) = (one_by_one(), one_by_one(), one_by_one());
    let mixed = run(&llm, requests.clone());
    let mut worst = 0f32;
    for (i, case) in cases.iter().enumerate() {
        for answer in [&alone[i], &mixed[i]] {
            worst = worst.max(class.check(&fixtures, case, answer));
        }
        // Only solo runs are compared: in the mixed batch, arrival times decide which requests share a step.
        assert!(alone[i].outputs == again[i].outputs, "{}: two runs differ", case.id);
    }
    errors::record_model(ModelErrors {
        model: model.to_owned(),
        dtype: class.dtype.to_string(),
        cases: cases.len(),
        worst_relative_logit_error: Some(worst),
    });
}

fixture_models! {
    model_meets;
    llama_exact: "llama", Class::EXACT;
    llama_bf16: "llama", BF16;
    llama_tied_exact: "llama-tied", Class::EXACT;
    llama_tied_bf16: "llama-tied", BF16;
    mistral_exact: "mistral", Class::EXACT;
    mistral_bf16: "mistral", BF16;
    qwen2_exact: "qwen2", Class::EXACT;
    qwen2_bf16: "qwen2", BF16;
    qwen3_exact: "qwen3", Class::EXACT;
    qwen3_bf16: "qwen3", BF16;
    llama_fp8_exact: "llama-fp8", Class::EXACT;
    llama_fp8_bf16: "llama-fp8", FP8;
}

/// Every adapter of the field fixtures, alone and all in one batch: logits and tokens equal those of PEFT.
#[test]
fn field_exact() {
    let mut wrong = Vec::new();
    for (model, cases) in dense_field_cases() {
        let llm = Llm::builder(field_model(&model))
            .dtype(Some(DType::F32))
            .lora_config(LoraConfig { max_loras: Some(64), ..LoraConfig::default() })
            .build(|| Cuda::new(0).map_err(Into::into))
            .expect("the model loads");
        let answers = FieldAnswers::of(&llm, cases);
        wrong.extend(answers.iter().flat_map(FieldAnswers::faults));
        errors::record_model(ModelErrors {
            model: format!("field, {model}"),
            dtype: DType::F32.to_string(),
            cases: answers.len(),
            worst_relative_logit_error: None,
        });
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The environment variable with the folder that `cargo xtask test-gpu --pack-model` wrote, after its `join` was run.
const DEMO_VARIABLE: &str = "LORAMUX_DEMO_MODEL";

/// The demo's model and adapters, from the variable's folder or else from the user's cache and the checkout.
fn demo() -> Option<[PathBuf; 2]> {
    if let Some(folder) = std::env::var_os(DEMO_VARIABLE).map(PathBuf::from) {
        return Some([folder.join(MODEL_FILE), folder.join("adapters")]);
    }
    let cached = cached_model_path().ok().filter(|path| path.is_file());
    Some([cached?, demo_adapters()])
}

/// Every case of the demo alone and all in one batch: tokens equal those of transformers and PEFT.
fn demo_meets(dtype: DType, tie: f32) {
    let Some([model, adapters]) = demo() else {
        // Not `eprintln!`, whose output is hidden unless a test fails.
        let note = "the demo is skipped: its model is not in the cache, and no folder is set by";
        let mut stderr = std::io::stderr();
        writeln!(stderr, "{note} {DEMO_VARIABLE}").unwrap();
        return;
    };
    // Leave memory for tests that run at the same time.
    let kv = KvCacheConfig { max_tokens: Some(1 << 14), ..KvCacheConfig::default() };
    let builder = builder(&model, dtype).kv_cache_config(kv);
    let llm = builder.build(|| Cuda::new(0).map_err(Into::into));
    let llm = llm.expect("the demo's model loads");
    let cases = DemoCase::all();
    let requests: Vec<_> = cases.iter().map(|case| case.request(&adapters)).collect();
    for (case, request) in cases.iter().zip(&requests) {
        case.check(&run(&llm, vec![request.clone()])[0], tie);
    }
    let mixed = run(&llm, requests);
    for (case, answer) in cases.iter().zip(&mixed) {
        case.check(answer, tie);
    }
    errors::record_model(ModelErrors {
        model: "demo".to_owned(),
        dtype: dtype.to_string(),
        cases: cases.len(),
        worst_relative_logit_error: None,
    });
}

#[test]
fn demo_exact() {
    demo_meets(DType::F32, 0.05);
}

/// Rounding the inputs of GEMMs to bf16 moves this model's logits by some tenths, also on the CPU.
#[test]
fn demo_bf16() {
    demo_meets(DType::Bf16, 0.5);
}
