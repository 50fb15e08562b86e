//! Structured output: texts follow their guide, whatever the weights and the temperature.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use lora_core::DType;
use lora_cpu_ref::CpuRef;
use loramux_engine::grammar::GuideError;
use loramux_engine::{
    CompletionOutput, FinishReason, GenerateRequest, GuidedDecodingParams, Llm, LlmError,
    LoadFormat, Prompt, SamplingParams, StopReason,
};
use loramux_tests::{engine, fixtures_dir, model_path, run};
use proptest::prelude::*;
use regex::Regex;
use serde_json::{Value, json};

const PROMPT: [u32; 5] = [17, 250, 33, 401, 8];
/// The end token of the fixture models.
const END: u32 = 2;

/// A request whose parameters are given as JSON.
fn request(sampling: Value) -> GenerateRequest {
    let sampling = serde_json::from_value(sampling).unwrap();
    GenerateRequest { prompt: Prompt::Ids(PROMPT.to_vec()), sampling, lora: None }
}

/// A request with a guide, sampled at a temperature.
fn guided(guide: &Value, temperature: f32, seed: u64) -> GenerateRequest {
    request(json!({"guided_decoding": guide, "temperature": temperature, "seed": seed,
        "max_tokens": 400}))
}

fn outputs(llm: &Llm, requests: Vec<GenerateRequest>) -> Vec<CompletionOutput> {
    run(llm, requests).into_iter().map(|mut answer| answer.outputs.remove(0)).collect()
}

fn one(llm: &Llm, sampling: Value) -> CompletionOutput {
    outputs(llm, vec![request(sampling)]).remove(0)
}

fn llama() -> Llm {
    engine("llama", DType::F32)
}

/// Schemas whose texts all fit 400 tokens, except for the number's. Lengths are bounded, because random weights rarely
/// end a string.
fn schemas() -> Vec<Value> {
    let compact = |mut schema: Value| {
        schema["x-guidance"] = json!({"whitespace_flexible": false});
        schema
    };
    let name = json!({"type": "string", "maxLength": 12});
    [
        json!({"enum": ["red", "green", "a \"quoted\" blue", 4, null, [true]]}),
        json!({"type": "integer", "minimum": -20, "maximum": 3_000}),
        json!({"type": "number", "minimum": 0, "maximum": 1}),
        json!({"type": "boolean"}),
        json!({"type": "string", "minLength": 3, "maxLength": 30}),
        json!({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}),
        json!({"type": "string", "format": "date"}),
        json!({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5}),
        json!({"anyOf": [{"const": "x"}, {"type": "null"}]}),
        json!({"type": "object", "additionalProperties": false, "required": ["name", "age"],
            "properties": {"name": name, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}}}),
        json!({"type": "object", "additionalProperties": false, "required": ["inner"],
            "$defs": {"point": {"type": "array", "minItems": 2, "maxItems": 2,
                "items": {"type": "integer", "minimum": 0, "maximum": 99}}},
            "properties": {"inner": {"type": "object", "additionalProperties": false,
                "required": ["from", "to"], "properties": {
                    "from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}}}}),
    ]
    .map(compact)
    .to_vec()
}

fn temperature() -> impl Strategy<Value = f32> {
    prop::sample::select(vec![0.0f32, 0.3, 1.0, 3.0, 100.0])
}

fn model() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["llama", "qwen2", "mistral"])
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 8, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn a_text_is_json_that_its_schema_accepts(
        model in model(), temperature in temperature(), seed: u64, bf16: bool,
    ) {
        let llm = engine(model, if bf16 { DType::Bf16 } else { DType::F32 });
        let schemas = schemas();
        let requests = schemas.iter().map(|s| guided(&json!({"json": s}), temperature, seed));
        for (output, schema) in outputs(&llm, requests.collect()).iter().zip(&schemas) {
            let mut text = output.text.clone();
            match output.finish_reason {
                FinishReason::Stop => prop_assert_eq!(output.token_ids.last(), Some(&END)),
                // A number may have any number of digits, so it may be cut off; one more digit completes it.
                _ if schema["type"] == "number" => text.push('0'),
                reason => prop_assert!(false, "{reason:?}, {schema}: {text}"),
            }
            let value: Value = serde_json::from_str(&text).expect(&text);
            prop_assert!(jsonschema::is_valid(schema, &value), "{}: {}", schema, text);
        }
    }

    #[test]
    fn a_text_matches_its_regular_expression(
        model in model(), temperature in temperature(), seed: u64,
    ) {
        let llm = engine(model, DType::F32);
        let patterns = [
            "yes|no", "[a-z]{3,20}", r"\d{4}-(0[1-9]|1[0-2])", "(ab?c{1,3}){4}", "é{2}[東京]{3}",
            r"https?://[a-z]{1,8}\.(org|com)/(\w{1,5}/){0,3}", "🦙 {1,3}🦙",
        ];
        let requests = patterns.iter().map(|p| guided(&json!({"regex": p}), temperature, seed));
        for (output, pattern) in outputs(&llm, requests.collect()).iter().zip(patterns) {
            let whole = Regex::new(&format!("^(?:{pattern})$")).unwrap();
            prop_assert!(whole.is_match(&output.text), "{}: {:?}", pattern, output.text);
            prop_assert_eq!(output.finish_reason, FinishReason::Stop);
        }
    }

    #[test]
    fn a_text_is_a_sentence_of_its_grammar(temperature in temperature(), seed: u64) {
        let llm = llama();
        let lark = "start: sum\nsum: term (\"+\" term){0,3}\nterm: NUMBER | \"(\" NUMBER \")\"\n\
            NUMBER: /[1-9][0-9]{0,3}/";
        let output = outputs(&llm, vec![guided(&json!({"grammar": lark}), temperature, seed)]);
        let text = &output[0].text;
        prop_assert_eq!(output[0].finish_reason, FinishReason::Stop);
        let terms: Vec<&str> = text.split('+').collect();
        let bare = |term: &&str| match term.strip_prefix('(') {
            Some(inner) => inner.strip_suffix(')').is_some_and(|n| n.parse::<u32>().is_ok()),
            None => term.parse::<u32>().is_ok(),
        };
        prop_assert!(terms.len() <= 4 && terms.iter().all(bare), "{}", text);
    }

    /// Random weights may never end an object, so a prefix is accepted: its only error is the end of the text.
    #[test]
    fn any_json_object_is_one_as_far_as_it_goes(temperature in temperature(), seed: u64) {
        let requests = (0..4).map(|i| guided(&json!({"json_object": true}), temperature, seed ^ i));
        for output in outputs(&llama(), requests.collect()) {
            prop_assert_eq!(output.text.chars().next(), Some('{'));
            match serde_json::from_str::<Value>(&output.text) {
                Ok(value) => prop_assert!(value.is_object()),
                // JSON allows numbers of any size, the parser does not.
                Err(error) if error.to_string().contains("number out of range") => {}
                Err(error) => {
                    prop_assert_eq!(output.finish_reason, FinishReason::Length);
                    prop_assert!(error.is_eof(), "{}: {}", error, output.text);
                }
            }
        }
    }
}

#[test]
fn guided_and_free_requests_share_a_batch_without_touching_each_other() {
    let llm = llama();
    let free: Vec<GenerateRequest> = [
        json!({"max_tokens": 24, "ignore_eos": true}),
        json!({"max_tokens": 24, "temperature": 1.5, "seed": 3, "frequency_penalty": 0.5,
            "bad_token_ids": [9, 10], "ignore_eos": true}),
    ]
    .map(request)
    .to_vec();
    let guides: Vec<GenerateRequest> =
        schemas().into_iter().map(|schema| guided(&json!({"json": schema}), 1.0, 4)).collect();
    let alone = |requests: &[GenerateRequest]| -> Vec<Vec<u32>> {
        requests.iter().map(|r| outputs(&llm, vec![r.clone()]).remove(0).token_ids).collect()
    };
    let (free_alone, guided_alone) = (alone(&free), alone(&guides));
    let mixed: Vec<GenerateRequest> =
        guides[..4].iter().chain(&free).chain(&guides[4..]).cloned().collect();
    let together: Vec<Vec<u32>> =
        outputs(&llm, mixed).into_iter().map(|output| output.token_ids).collect();
    assert_eq!(together[4..6], free_alone);
    assert_eq!(together[..4], guided_alone[..4]);
    assert_eq!(together[6..], guided_alone[4..]);
}

#[test]
fn a_limit_cuts_a_text_without_an_error() {
    let whole = json!({"regex": "[a-z]{20}"});
    let output = one(&llama(), json!({"guided_decoding": whole, "max_tokens": 3}));
    assert_eq!((output.finish_reason, output.token_ids.len()), (FinishReason::Length, 3));
    assert!(output.text.chars().all(|c| c.is_ascii_lowercase()), "{}", output.text);
}

#[test]
fn a_broken_guide_fails_its_own_request_alone() {
    let llm = llama();
    let bad = |guide: Value| request(json!({"guided_decoding": guide}));
    let fine = request(json!({"max_tokens": 4, "ignore_eos": true}));
    let alone = outputs(&llm, vec![fine.clone()]).remove(0).token_ids;
    let broken = [
        (bad(json!({"json": {"type": "dragon"}})), "guided_decoding.json", "dragon"),
        (bad(json!({"json": "{"})), "guided_decoding.json", "EOF"),
        (bad(json!({"regex": "(a"})), "guided_decoding.regex", "unclosed"),
        (bad(json!({"grammar": "start: nothing"})), "guided_decoding.grammar", "nothing"),
        (bad(json!({"structural_tag": "{}"})), "guided_decoding.structural_tag", "not supported"),
        (bad(json!({})), "guided_decoding", "none of its fields"),
    ];
    let mut requests = vec![fine.clone()];
    requests.extend(broken.iter().flat_map(|(bad, ..)| [bad.clone(), fine.clone()]));
    let answers = llm.generate_each(requests, &mut |_| ());
    for (answer, (_, field, named)) in answers.iter().skip(1).step_by(2).zip(&broken) {
        let error = answer.as_ref().unwrap_err().to_string();
        assert!(error.contains(field) && error.contains(named), "{error}");
    }
    for answer in answers.iter().step_by(2) {
        assert_eq!(answer.as_ref().unwrap().outputs[0].token_ids, alone);
    }
}

#[test]
fn each_output_of_a_request_follows_the_guide_by_itself() {
    let answer = run(
        &llama(),
        vec![request(json!({"n": 4, "temperature": 3.0,
        "max_tokens": 60, "guided_decoding": {"regex": "[a-z]{10}"}}))],
    );
    let texts: Vec<&str> = answer[0].outputs.iter().map(|o| o.text.as_str()).collect();
    let ten = Regex::new("^[a-z]{10}$").unwrap();
    assert!(texts.len() == 4 && texts.iter().all(|text| ten.is_match(text)), "{texts:?}");
    assert!(texts.iter().any(|text| *text != texts[0]), "{texts:?}");
}

#[test]
fn an_output_that_ends_with_its_first_token_ends_alone() {
    let llm = llama();
    for sampling in [
        json!({"n": 4, "temperature": 3.0, "max_tokens": 1, "ignore_eos": true}),
        json!({"n": 4, "temperature": 3.0, "ignore_eos": true,
            "guided_decoding": {"regex": "[a-z]"}}),
    ] {
        let answer = run(&llm, vec![request(sampling)]);
        let lengths: Vec<usize> = answer[0].outputs.iter().map(|o| o.token_ids.len()).collect();
        assert_eq!(lengths, [1; 4]);
    }
}

#[test]
fn a_text_that_can_go_on_does_until_min_tokens() {
    let llm = llama();
    let guide = json!({"regex": "[ab]{1,40}"});
    for seed in 0..8 {
        let output = one(
            &llm,
            json!({"guided_decoding": guide, "min_tokens": 10,
            "temperature": 2.0, "seed": seed, "max_tokens": 60}),
        );
        assert!(output.token_ids.len() > 10, "{}", output.text);
    }
    // After a complete text, only the end token is allowed.
    let output = one(&llm, json!({"guided_decoding": {"regex": "yes"}, "min_tokens": 10}));
    assert_eq!((output.text.as_str(), output.finish_reason), ("yes", FinishReason::Stop));
}

/// All tokens of the fixture models with the letter `b`.
fn with_b(llm: &Llm) -> Vec<u32> {
    let tokenizer = llm.text().tokenizer().unwrap();
    (0..512).filter(|id| tokenizer.decode(&[*id], true).unwrap().contains('b')).collect()
}

#[test]
fn bans_hold_inside_a_guide_and_fail_a_text_that_needs_what_is_banned() {
    let llm = llama();
    let banned = with_b(&llm);
    let guide = |regex| {
        json!({"guided_decoding": {"regex": regex}, "bad_token_ids": banned,
        "temperature": 2.0})
    };
    assert_eq!(one(&llm, guide("[ab]{12}")).text, "a".repeat(12));
    let fine = request(json!({"max_tokens": 4}));
    let answers = llm.generate_each(vec![request(guide("aab")), fine.clone()], &mut |_| ());
    let error = answers[0].as_ref().unwrap_err();
    let stuck = matches!(error, LlmError::Guide(GuideError::NoToken { generated: 1.. }));
    assert!(stuck && error.to_string().contains("bad_token_ids"), "{error}");
    assert_eq!(answers[1].as_ref().unwrap().outputs, outputs(&llm, vec![fine]));
}

#[test]
fn stops_end_a_text_before_its_guide_does() {
    let llm = llama();
    let guide = json!({"regex": "one two three"});
    let output = one(&llm, json!({"guided_decoding": guide, "stop": " two"}));
    assert_eq!(output.text, "one");
    assert_eq!(output.stop_reason, Some(StopReason::Text(" two".to_owned())));
    let tokenizer = llm.text().tokenizer().unwrap();
    let stop: Vec<u32> =
        (3..512).filter(|id| tokenizer.decode(&[*id], true).unwrap().contains('w')).collect();
    let output = one(&llm, json!({"guided_decoding": guide, "stop_token_ids": stop}));
    assert!("one t".starts_with(&output.text), "{}", output.text);
    assert!(matches!(output.stop_reason, Some(StopReason::Token(id)) if stop.contains(&id)));
}

#[test]
fn without_an_end_token_a_complete_text_ends_by_itself() {
    let llm = llama();
    for more in [json!({"ignore_eos": true}), json!({"end_id": -1})] {
        let mut sampling = json!({"guided_decoding": {"regex": "yes"}});
        sampling.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let output = one(&llm, sampling);
        assert_eq!((output.text.as_str(), output.finish_reason), ("yes", FinishReason::Stop));
        assert!(!output.token_ids.contains(&END));
    }
}

/// A tiny model with made-up weights in a new folder, and 49,152 tokens and one more.
fn wide_model() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = std::fs::read(model_path("llama").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["vocab_size"] = json!(49_153);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

#[test]
fn a_real_vocabulary_spells_the_same_texts() {
    let dir = wide_model();
    let llm = Llm::builder(dir.path())
        .load_format(LoadFormat::Dummy)
        .tokenizer(fixtures_dir().join("demo-tokenizer"))
        .build(|| CpuRef::with_threads(None))
        .unwrap();
    let schemas = schemas().into_iter().filter(|schema| schema["type"] != "number");
    for (schema, temperature) in schemas.zip([0.0, 1.0, 30.0].iter().cycle()) {
        let output = outputs(&llm, vec![guided(&json!({"json": schema}), *temperature, 1)]);
        let value: Value = serde_json::from_str(&output[0].text).expect(&output[0].text);
        assert!(jsonschema::is_valid(&schema, &value), "{schema}: {value}");
    }
}

#[test]
fn a_model_without_a_tokenizer_follows_no_guide() {
    let dir = wide_model();
    let llm = Llm::builder(dir.path())
        .load_format(LoadFormat::Dummy)
        .build(|| CpuRef::with_threads(None))
        .unwrap();
    let guided = GuidedDecodingParams { json_object: true, ..Default::default() };
    let sampling = SamplingParams { guided_decoding: Some(guided), ..Default::default() };
    let request = GenerateRequest { prompt: Prompt::Ids(vec![1]), sampling, lora: None };
    let answer = llm.generate_each(vec![request], &mut |_| ()).remove(0);
    assert!(matches!(answer, Err(LlmError::NoTokenizer { .. })));
}
