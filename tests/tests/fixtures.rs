//! Every case of the fixtures, alone and in one mixed batch: logits and tokens must equal those of transformers and
//! PEFT, and the batch must not change a bit.

use lora_core::DType;
use loramux_engine::RequestOutput;
use loramux_tests::{Case, Class, Fixtures, engine, fixture_models, run};

const BF16: Class = Class { dtype: DType::Bf16, logits: 3e-2, tie: 0.2 };
/// More precise than bf16, so the bounds are no larger.
const F16: Class = Class { dtype: DType::F16, logits: 3e-2, tie: 0.2 };

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
        class.check(&fixtures, case, alone);
        assert_eq!(alone.context_logits, mixed.context_logits, "{}: the batch matters", case.id);
        assert_eq!(alone.outputs, mixed.outputs, "{}: the batch matters", case.id);
    }
}

fixture_models! {
    model_meets;
    llama_exact: "llama", Class::EXACT;
    llama_bf16: "llama", BF16;
    llama_f16: "llama", F16;
    llama_tied_exact: "llama-tied", Class::EXACT;
    llama_tied_bf16: "llama-tied", BF16;
    mistral_exact: "mistral", Class::EXACT;
    mistral_bf16: "mistral", BF16;
    qwen2_exact: "qwen2", Class::EXACT;
    qwen2_bf16: "qwen2", BF16;
    qwen3_exact: "qwen3", Class::EXACT;
    qwen3_bf16: "qwen3", BF16;
}
