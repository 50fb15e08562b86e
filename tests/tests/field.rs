//! Every adapter of the field fixtures on a dense model, alone and all in one batch: logits and tokens
//! must be PEFT's, and the batch must not change a bit.

use std::collections::BTreeMap;

use engine::{Llm, LlmError, RequestOutput};
use lora_core::{DType, LoraConfig};
use lora_cpu_ref::CpuRef;
use polylora_tests::{FieldCase, field_cases, field_model};

fn engine(model: &str) -> Result<Llm, LlmError> {
    Llm::builder(field_model(model))
        .dtype(Some(DType::F32))
        .lora_config(LoraConfig { max_loras: Some(64), ..LoraConfig::default() })
        .build(|| CpuRef::with_threads(None))
}

/// Cases on models that run, by model. Those in words are `field_text`'s.
fn dense_cases() -> BTreeMap<String, Vec<FieldCase>> {
    let mut by_model: BTreeMap<String, Vec<FieldCase>> = BTreeMap::new();
    let served = field_cases().into_iter().filter(|case| case.kind != "moe");
    for case in served.filter(|case| case.note.is_none()) {
        by_model.entry(case.case.model.clone()).or_default().push(case);
    }
    by_model
}

#[test]
fn every_adapter_gives_what_peft_gives() {
    let mut wrong = Vec::new();
    let mut count = 0;
    for (model, cases) in dense_cases() {
        let llm = match engine(&model) {
            Ok(llm) => llm,
            Err(error) => {
                wrong.push(format!("{model}: {error}"));
                continue;
            }
        };
        let requests = FieldCase::requests(&cases);
        let alone: Vec<_> = requests
            .iter()
            .flat_map(|request| llm.generate_each(vec![request.clone()], &mut |_| ()))
            .collect();
        let mixed = llm.generate_each(requests, &mut |_| ());
        for ((case, alone), mixed) in cases.iter().zip(alone).zip(mixed) {
            count += 1;
            let id = &case.case.id;
            let same = |alone: &RequestOutput, mixed: &RequestOutput| {
                alone.context_logits == mixed.context_logits && alone.outputs == mixed.outputs
            };
            match (alone, mixed) {
                (Ok(alone), Ok(mixed)) => {
                    wrong.extend(case.difference(&alone).map(|how| format!("{id}: {how}")));
                    if !same(&alone, &mixed) {
                        wrong.push(format!("{id}: the batch matters"));
                    }
                }
                (Err(error), _) | (_, Err(error)) => wrong.push(format!("{id}: {error}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {count} cases:\n{}", wrong.len(), wrong.join("\n"));
    assert!(count >= 150, "{count} cases");
}
