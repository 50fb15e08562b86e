//! The CUDA backend: the suite of all backends, and the fixtures end to end. Needs a GPU.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use engine::{Llm, RequestOutput};
use lora_core::{DType, LoraConfig};
use lora_cuda::Cuda;
use polylora_tests::suite::Types;
use polylora_tests::{Case, Fixtures, backend_suite, model_path, relative_error, run};

/// A device that checks the ids it is given, as the suite's misuses want it.
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

/// What a dtype has to reach.
struct Class {
    dtype: DType,
    logits: f32,
    tie: f32,
}

const EXACT: Class = Class { dtype: DType::F32, logits: 2e-3, tie: 0.01 };
const BF16: Class = Class { dtype: DType::Bf16, logits: 1e-1, tie: 0.05 };

fn logits(answer: &RequestOutput) -> Vec<f32> {
    answer.context_logits.iter().flatten().flatten().copied().collect()
}

/// Every case alone and all in one batch: logits and tokens are those of transformers and PEFT.
fn model_meets(model: &str, class: &Class) {
    let fixtures = Fixtures::load();
    let cases = fixtures.of_model(model);
    assert!(cases.len() >= 9, "{model} has {} cases", cases.len());
    let llm = Llm::builder(model_path(model))
        .dtype(Some(class.dtype))
        .lora_config(LoraConfig { max_loras: Some(16), ..LoraConfig::default() })
        .build(|| Cuda::new(0).map_err(Into::into))
        .expect("the fixture model loads");
    let requests = Case::requests(&cases);
    let alone = requests.iter().flat_map(|request| run(&llm, vec![request.clone()]));
    let alone: Vec<RequestOutput> = alone.collect();
    let mixed = run(&llm, requests.clone());
    let again = run(&llm, requests);
    let mut worst = 0f32;
    for (i, case) in cases.iter().enumerate() {
        for answer in [&alone[i], &mixed[i]] {
            let error = relative_error(&logits(answer), &fixtures.logits(case));
            worst = worst.max(error);
            assert!(error < class.logits, "{} in {}: off by {error}", case.id, class.dtype);
            case.assert_greedy(&answer.outputs[0].token_ids, class.tie);
        }
        assert_eq!(mixed[i].outputs, again[i].outputs, "{}: not the same bits twice", case.id);
    }
    println!("{model} in {}: {} cases, worst error {worst:e}", class.dtype, cases.len());
}

macro_rules! models {
    ($($name:ident: $model:literal, $class:expr;)*) => {
        $(#[test]
        fn $name() {
            model_meets($model, &$class);
        })*
    };
}

models! {
    llama_exact: "llama", EXACT;
    llama_bf16: "llama", BF16;
    llama_tied_exact: "llama-tied", EXACT;
    llama_tied_bf16: "llama-tied", BF16;
    mistral_exact: "mistral", EXACT;
    mistral_bf16: "mistral", BF16;
    qwen2_exact: "qwen2", EXACT;
    qwen2_bf16: "qwen2", BF16;
    qwen3_exact: "qwen3", EXACT;
    qwen3_bf16: "qwen3", BF16;
    llama_fp8_exact: "llama-fp8", EXACT;
}
