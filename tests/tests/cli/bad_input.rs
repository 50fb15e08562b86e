//! Bad input gives a clear error and does not affect other requests.

use std::path::{Path, PathBuf};

use lora_core::{DType, LoraRequest};
use loramux::Exit;
use loramux_engine::{LlmError, PerPrompt, SamplingParams};
use loramux_tests::{adapter_path, engine};
use serde_json::{Value, json};

use super::support::{Copy, adapter_flag, generate, json_lines, llama, loramux};

/// A request that fails, and words that its error must contain.
struct Bad {
    line: Vec<u8>,
    named: Vec<&'static str>,
}

fn bad(line: &Value, named: &[&'static str]) -> Bad {
    Bad { line: line.to_string().into_bytes(), named: named.to_vec() }
}

/// A request that brings its own adapter.
fn with_adapter(id: i64, path: &Path) -> Value {
    let name = format!("bad-{id}");
    let lora = json!({"lora_name": name, "lora_int_id": id, "lora_path": path});
    json!({"id": id, "prompt": "x", "lora_request": lora})
}

/// Adapters with one defect each.
fn bad_adapters(dir: &Path) -> Vec<Bad> {
    let copy = |name: &str| Copy::new(dir, name);
    let narrow = copy("narrow").with_tensors("lora_A", |tensor| {
        tensor.shape[1] /= 2;
        tensor.bytes.truncate(tensor.bytes.len() / 2);
    });
    let infinite = copy("infinite").with_tensors("layers.1.self_attn.v_proj.lora_B", |tensor| {
        tensor.bytes[..2].copy_from_slice(&[0x80, 0x7f]);
    });
    let idle = copy("idle").with_tensors("lora_B", |tensor| tensor.bytes.fill(0));
    let cases: [(PathBuf, &[&'static str]); 9] = [
        (copy("empty").without_weights().path(), &["adapter_model.safetensors", "missing"]),
        (copy("truncated").truncated().path(), &["adapter_model.safetensors", "bytes"]),
        (narrow.path(), &["lora_A of layer 0 attn_q", "[8, 32]", "[8, 64]"]),
        (infinite.path(), &["layers.1.self_attn.v_proj", "non-finite"]),
        (idle.path(), &["allow_noop_adapter"]),
        (copy("kind").with_config("peft_type", json!("LOHA")).path(), &["LOHA", "peft_type"]),
        (copy("field").with_config("lora_magic", json!(3)).path(), &["lora_magic"]),
        (adapter_path("qwen3.attn-r8"), &["lora_B of layer 0 attn_q", "[128, 8]", "trained for"]),
        (dir.join("absent"), &["absent", "does not exist"]),
    ];
    (100..).zip(cases).map(|(id, (path, named))| bad(&with_adapter(id, &path), named)).collect()
}

/// Requests that are invalid on an engine whose adapter `good` has id 0.
fn bad_requests() -> Vec<Bad> {
    let clash = json!({"lora_name": "other", "lora_int_id": 0,
        "lora_path": adapter_path("llama.dora-r8")});
    vec![
        bad(&json!({"prompt": "x", "lora": "nobody"}), &["\"nobody\"", "known: good"]),
        bad(&json!({"prompt": "x", "lora_request": clash}), &["lora_int_id 0", "llama.dora-r8"]),
        bad(&json!({"prompt": ""}), &["prompt is empty"]),
        bad(&json!({"input_ids": []}), &["prompt is empty"]),
        bad(&json!({"input_ids": vec![7; 512]}), &["512 tokens", "max_seq_len"]),
        bad(&json!({"input_ids": [5, 512]}), &["input_ids[1] is 512", "0 to 511"]),
        bad(&json!({"messages": [{"role": "user", "content": "x"}]}), &["chat template"]),
        bad(&json!({"prompt": "x", "sampling": {"top_p": 2}}), &["`top_p` is 2"]),
        bad(&json!({"prompt": "x", "sampling": {"stop": ""}}), &["`stop`", "empty string"]),
        bad(&json!({"prompt": "x", "smapling": {}}), &["unknown field `smapling`"]),
        Bad { line: b"{\"prompt\": \"\xff\"}".to_vec(), named: vec!["UTF-8", "byte 12"] },
        Bad { line: b"not JSON".to_vec(), named: vec!["line ", "column"] },
    ]
}

#[test]
fn every_bad_line_tells_why_and_the_others_are_answered_as_alone() {
    let dir = tempfile::tempdir().unwrap();
    let flag = adapter_flag("good", "llama.attn-r8");
    let flags = [flag.as_str(), "--ignore-eos", "--max-tokens", "8"];
    let fine = [
        json!({"prompt": "Hi there", "lora": "good"}),
        json!({"prompt": "Once upon a time"}),
        json!({"input_ids": [5, 6, 7], "lora": "good"}),
    ];
    let alone: Vec<Value> = fine
        .iter()
        .map(|line| generate(&flags, &json_lines(std::slice::from_ref(line))).1.remove(0))
        .collect();

    let mut failing = bad_requests();
    failing.extend(bad_adapters(dir.path()));
    // The good adapter goes first, so that its id is registered when another one claims it.
    let mut lines = json_lines(&fine[..1]);
    for (bad, fine) in failing.iter().zip(fine.iter().cycle()) {
        lines.extend_from_slice(&bad.line);
        lines.push(b'\n');
        lines.extend(json_lines(std::slice::from_ref(fine)));
    }
    let (exit, answers) = generate(&flags, &lines);
    assert_eq!((exit, answers.len()), (Exit::Refused, 2 * failing.len() + 1));
    assert_eq!(answers[0], alone[0]);
    for (index, (bad, alone)) in failing.iter().zip(alone.iter().cycle()).enumerate() {
        let error = answers[2 * index + 1]["error"].as_str().unwrap();
        for name in &bad.named {
            assert!(error.contains(name), "{name} is not in: {error}");
        }
        assert_eq!(&answers[2 * index + 2], alone, "after: {error}");
    }
}

#[test]
fn an_adapter_without_any_configured_is_an_error_and_not_base_output() {
    let (exit, answers) = generate(&[], &json_lines(&[json!({"prompt": "x", "lora": "sql"})]));
    assert_eq!(exit, Exit::Refused);
    let error = answers[0]["error"].as_str().unwrap();
    assert!(error.contains("\"sql\"") && error.contains("--adapter"), "{error}");
    assert_eq!(answers[0]["lora"], "sql");
}

#[test]
fn a_known_name_with_another_path_is_refused() {
    let lora = |id: i64, name: &str| {
        json!({"prompt": "x", "lora_request": {"lora_name": "n", "lora_int_id": id,
            "lora_path": adapter_path(name)}})
    };
    let lines = json_lines(&[
        lora(1, "llama.attn-r8"),
        lora(2, "llama.dora-r8"),
        lora(3, "llama.attn-r8"),
        lora(1, "llama.attn-r8"),
    ]);
    let (_, answers) = generate(&[], &lines);
    assert!(answers[1]["error"].as_str().unwrap().contains("lora_name \"n\""));
    assert!(answers[2]["error"].as_str().unwrap().contains("lora_int_id 1"));
    assert_eq!(answers[3]["outputs"], answers[0]["outputs"]);
}

#[test]
fn an_adapter_over_the_rank_limit_names_the_setting() {
    let flag = adapter_flag("a", "llama.all-r16-rslora");
    let line = json_lines(&[json!({"prompt": "x", "lora": "a"}), json!({"prompt": "x"})]);
    let (_, answers) = generate(&[&flag, "--max-lora-rank", "8"], &line);
    let error = answers[0]["error"].as_str().unwrap();
    assert!(error.contains("max_lora_rank") && error.contains("to 16 or more"), "{error}");
    assert!(answers[1]["outputs"].is_array());
}

#[test]
fn a_list_of_the_wrong_length_is_refused_both_ways() {
    let llm = engine("llama", DType::F32);
    let lora = LoraRequest::new("a", 0, adapter_path("llama.attn-r8"));
    for length in [1, 3] {
        let loras = PerPrompt::Each(vec![Some(lora.clone()); length]);
        let error = llm.generate(["x", "y"], SamplingParams::default(), loras).unwrap_err();
        assert!(matches!(error, LlmError::ListLength { prompts: 2, .. }));
        let sampling = vec![SamplingParams::default(); length];
        let error = llm.generate(["x", "y"], sampling, ()).unwrap_err();
        assert!(error.to_string().contains("sampling_params") && error.to_string().contains('2'));
    }
}

#[test]
fn a_model_that_cannot_be_loaded_has_its_own_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let absent = dir.path().join("absent");
    for path in [dir.path(), &absent] {
        let path = path.to_str().unwrap();
        let outcome = loramux(&["generate", "--model", path, "--prompt", "x"], b"");
        assert_eq!(outcome.exit, Exit::Model);
        assert!(outcome.stderr.contains(path), "{}", outcome.stderr);
    }
    let long = ["generate", "--model", &llama(), "--prompt", "x", "--max-seq-len", "513"];
    let outcome = loramux(&long, b"");
    assert_eq!(outcome.exit, Exit::Usage);
    assert!(outcome.stderr.contains("max_seq_len is 513") && outcome.stderr.contains("512"));
}
