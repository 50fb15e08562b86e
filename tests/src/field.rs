//! Adapters as trainers save them, and PEFT's answers; see `tests/fixtures/field/README.md`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lora_core::LoraRequest;
use loramux_engine::{GenerateRequest, Llm, LlmError, RequestOutput};
use serde::Deserialize;
use serde_json::Value;

use crate::fixtures::{Case, fixtures_dir, model_path};

/// One row of `field/cases.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct FieldCase {
    /// Prompt, continuation and margins.
    #[serde(flatten)]
    pub case: Case,
    /// The request; see the README.
    pub kind: String,
    /// The most likely tokens and their log-probabilities, after each token of the prompt.
    pub top: Vec<Vec<(u32, f32)>>,
    /// The expected result of a request with text.
    #[serde(default)]
    pub note: Option<Value>,
}

/// The folder of these fixtures.
pub fn field_dir() -> PathBuf {
    fixtures_dir().join("field")
}

/// The folder of a model, either here or among the other fixtures.
pub fn field_model(name: &str) -> PathBuf {
    let own = field_dir().join("models").join(name);
    if own.is_dir() { own } else { model_path(name) }
}

/// All cases.
///
/// # Panics
/// If they are not there: the checkout is broken.
pub fn field_cases() -> Vec<FieldCase> {
    let text = std::fs::read(field_dir().join("cases.json")).expect("field/cases.json");
    serde_json::from_slice(&text).expect("field/cases.json")
}

/// Cases on dense models by model, without those for requests with text, which `field_text` tests.
pub fn dense_field_cases() -> BTreeMap<String, Vec<FieldCase>> {
    let mut by_model: BTreeMap<String, Vec<FieldCase>> = BTreeMap::new();
    let served = field_cases().into_iter().filter(|case| case.kind != "moe");
    for case in served.filter(|case| case.note.is_none()) {
        by_model.entry(case.case.model.clone()).or_default().push(case);
    }
    by_model
}

/// The answers to a case, alone and in one batch with the other cases of its model.
pub struct FieldAnswers {
    /// The case.
    pub case: FieldCase,
    /// The answer to the case alone.
    pub alone: Result<RequestOutput, LlmError>,
    /// The answer in the batch.
    pub mixed: Result<RequestOutput, LlmError>,
}

impl FieldAnswers {
    /// Answers to the cases of one model.
    pub fn of(llm: &Llm, cases: Vec<FieldCase>) -> Vec<Self> {
        let requests = FieldCase::requests(&cases);
        let ask = |requests| llm.generate_each(requests, &mut |_| ());
        let alone: Vec<_> =
            requests.iter().flat_map(|request| ask(vec![request.clone()])).collect();
        let answers = cases.into_iter().zip(alone).zip(ask(requests));
        answers.map(|((case, alone), mixed)| Self { case, alone, mixed }).collect()
    }

    /// The differences from PEFT, alone or in the batch.
    pub fn faults(&self) -> Vec<String> {
        let fault = |answer: &Result<RequestOutput, LlmError>| match answer {
            Ok(output) => self.case.difference(output),
            Err(error) => Some(error.to_string()),
        };
        let found = [("alone", fault(&self.alone)), ("mixed", fault(&self.mixed))];
        let id = &self.case.case.id;
        found
            .into_iter()
            .filter_map(|(how, fault)| Some(format!("{id}, {how}: {}", fault?)))
            .collect()
    }

    /// Whether both answers are bitwise equal.
    pub fn is_batch_invariant(&self) -> bool {
        match (&self.alone, &self.mixed) {
            (Ok(alone), Ok(mixed)) => {
                alone.context_logits == mixed.context_logits && alone.outputs == mixed.outputs
            }
            _ => true,
        }
    }
}

impl FieldCase {
    /// The request of the case, whose adapter has this id.
    pub fn request(&self, lora_id: i64) -> GenerateRequest {
        let lora = self.case.adapter.as_ref().map(|name| {
            LoraRequest::new(name.clone(), lora_id, field_dir().join("adapters").join(name))
        });
        GenerateRequest { lora, ..self.case.request(lora_id) }
    }

    /// Requests of many cases; each adapter gets one id.
    pub fn requests(cases: &[Self]) -> Vec<GenerateRequest> {
        let mut names: Vec<_> = cases.iter().map(|case| case.case.adapter.clone()).collect();
        names.sort_unstable();
        names.dedup();
        let id = |case: &Self| names.iter().position(|name| *name == case.case.adapter);
        cases.iter().map(|case| case.request(id(case).unwrap_or(0) as i64)).collect()
    }

    /// The difference of an answer from PEFT's, if there is one: log-probabilities that differ by more than
    /// 2e-3 of their size, or tokens that differ although the margin is above 0.01.
    pub fn difference(&self, output: &RequestOutput) -> Option<String> {
        self.other_logits(output).or_else(|| self.other_tokens(output))
    }

    fn other_logits(&self, output: &RequestOutput) -> Option<String> {
        let logits = output.context_logits.as_ref()?;
        for (position, (row, top)) in logits.iter().zip(&self.top).enumerate() {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = row.iter().map(|logit| (logit - largest).exp()).sum();
            for (token, expected) in top {
                let found = row[*token as usize] - largest - sum.ln();
                if (found - expected).abs() > 2e-3 * expected.abs().max(1.0) {
                    return Some(format!("{position}: token {token} has {found}, not {expected}"));
                }
            }
        }
        (logits.len() != self.top.len()).then(|| format!("{} rows of logits", logits.len()))
    }

    fn other_tokens(&self, output: &RequestOutput) -> Option<String> {
        let Case { greedy, margin, .. } = &self.case;
        let found = &output.outputs[0].token_ids;
        let steps = found.iter().zip(greedy).zip(margin);
        for (step, ((found, expected), margin)) in steps.enumerate() {
            if found != expected {
                // After a near tie, another continuation is as good.
                return (*margin > 0.01).then(|| format!("step {step}: {found}, not {expected}"));
            }
        }
        (found.len() != greedy.len()).then(|| format!("{} tokens", found.len()))
    }
}
