//! Every case of the fixtures, alone and in one mixed batch: logits and tokens must be those of
//! transformers and PEFT, and a batch must not change a bit.

use engine::RequestOutput;
use lora_core::DType;
use polylora_tests::{Case, Fixtures, engine, relative_error, run};

/// What a dtype has to reach.
struct Class {
    dtype: DType,
    logits: f32,
    tie: f32,
}

const EXACT: Class = Class { dtype: DType::F32, logits: 2e-3, tie: 0.01 };
const BF16: Class = Class { dtype: DType::Bf16, logits: 3e-2, tie: 0.2 };
/// Finer than bf16, so held to no less.
const F16: Class = Class { dtype: DType::F16, logits: 3e-2, tie: 0.2 };

fn check(fixtures: &Fixtures, case: &Case, answer: &RequestOutput, class: &Class) {
    let found: Vec<f32> = answer.context_logits.iter().flatten().flatten().copied().collect();
    let error = relative_error(&found, &fixtures.logits(case));
    assert!(error < class.logits, "{} in {}: logits off by {error}", case.id, class.dtype);
    case.assert_greedy(&answer.outputs[0].token_ids, class.tie);
}

fn model_meets(model: &str, class: &Class) {
    let fixtures = Fixtures::load();
    let cases = fixtures.of_model(model);
    assert!(cases.len() >= 9, "{model} has {} cases", cases.len());
    let llm = engine(model, class.dtype);
    let requests = Case::requests(&cases);
    let alone: Vec<RequestOutput> =
        requests.iter().flat_map(|r| run(&llm, vec![r.clone()])).collect();
    let mixed = run(&llm, requests);
    for ((case, alone), mixed) in cases.iter().zip(&alone).zip(&mixed) {
        check(&fixtures, case, alone, class);
        assert_eq!(alone.context_logits, mixed.context_logits, "{}: the batch matters", case.id);
        assert_eq!(alone.outputs, mixed.outputs, "{}: the batch matters", case.id);
    }
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
    llama_f16: "llama", F16;
    llama_tied_exact: "llama-tied", EXACT;
    llama_tied_bf16: "llama-tied", BF16;
    mistral_exact: "mistral", EXACT;
    mistral_bf16: "mistral", BF16;
    qwen2_exact: "qwen2", EXACT;
    qwen2_bf16: "qwen2", BF16;
    qwen3_exact: "qwen3", EXACT;
    qwen3_bf16: "qwen3", BF16;
}
