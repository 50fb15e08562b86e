//! Every adapter of the field fixtures on a dense model, alone and all in one batch: logits and tokens must
//! be PEFT's, and the batch must not change any bit.

use lora_core::{DType, LoraConfig};
use lora_cpu_ref::CpuRef;
use loramux_engine::{Llm, LlmError};
use loramux_tests::{FieldAnswers, dense_field_cases, field_model};

fn engine(model: &str) -> Result<Llm, LlmError> {
    Llm::builder(field_model(model))
        .dtype(Some(DType::F32))
        .lora_config(LoraConfig { max_loras: Some(64), ..LoraConfig::default() })
        .build(|| CpuRef::with_threads(None))
}

#[test]
fn every_adapter_gives_what_peft_gives() {
    let (mut wrong, mut count) = (Vec::new(), 0);
    for (model, cases) in dense_field_cases() {
        count += cases.len();
        match engine(&model) {
            Ok(llm) => {
                for answers in FieldAnswers::of(&llm, cases) {
                    wrong.extend(answers.faults());
                    if !answers.is_batch_invariant() {
                        wrong.push(format!("{}: the batch matters", answers.case.case.id));
                    }
                }
            }
            Err(error) => wrong.push(format!("{model}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "of {count} cases:\n{}", wrong.join("\n"));
    assert!(count >= 150, "{count} cases");
}
