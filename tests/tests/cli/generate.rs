//! `loramux generate` with valid input.

use std::io::Write;

use loramux::Exit;
use loramux_tests::{Fixtures, adapter_path};
use serde_json::{Value, json};

use super::support::{adapter_flag, generate, json_lines, llama, loramux};

const PROMPT: &str = "Hi there";

/// The tokens of a fixture model's random weights before any end token.
fn tokens(answer: &Value) -> Vec<u32> {
    serde_json::from_value(answer["outputs"][0]["token_ids"].clone()).unwrap()
}

#[test]
fn lines_are_answered_in_order_with_the_tokens_that_peft_computes() {
    let cases = Fixtures::load().of_model("llama");
    assert!(cases.len() > 10);
    let mut names: Vec<String> = cases.iter().filter_map(|case| case.adapter.clone()).collect();
    names.dedup();
    let flags: Vec<String> = names.iter().map(|name| adapter_flag(name, name)).collect();
    let flags: Vec<&str> = flags.iter().map(String::as_str).chain(["--ignore-eos"]).collect();
    let line = |case: &loramux_tests::Case| {
        json!({"id": case.id, "input_ids": case.prompt, "lora": case.adapter,
            "sampling": {"max_tokens": case.greedy.len()}})
    };
    let lines: Vec<Value> = cases.iter().map(line).collect();
    let (exit, answers) = generate(&flags, &json_lines(&lines));
    assert_eq!((exit, answers.len()), (Exit::Fine, cases.len()));
    for (case, answer) in cases.iter().zip(&answers) {
        assert_eq!(answer["id"], json!(case.id));
        assert_eq!(answer["lora"], json!(case.adapter));
        assert_eq!(answer["prompt_token_ids"], json!(case.prompt));
        assert_eq!(answer["outputs"][0]["finish_reason"], "length");
        case.assert_greedy(&tokens(answer), 1e-2);
    }
}

/// A file of settings.
fn settings(yaml: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    file.write_all(yaml.as_bytes()).unwrap();
    file
}

#[test]
fn a_file_of_settings_configures_the_engine_and_flags_override_it() {
    let lines = json_lines(&[json!({"prompt": PROMPT, "sampling": {"logprobs": 1}})]);
    let logprobs = |flags: &[&str]| {
        let (exit, answers) = generate(flags, &lines);
        assert_eq!(exit, Exit::Fine, "{flags:?}");
        answers[0]["outputs"][0]["logprobs"].to_string()
    };
    let (plain, fp8) = (logprobs(&[]), logprobs(&["--kv-cache-dtype", "fp8"]));
    let file = settings("kv_cache_config: {dtype: fp8}\nlora_config: {max_lora_rank: 8}\n");
    let config = file.path().to_str().unwrap();
    assert_eq!(logprobs(&["--config", config]), fp8);
    assert_eq!(logprobs(&["--config", config, "--kv-cache-dtype", "auto"]), plain);

    let prompt = ["generate", "--model", &llama(), "--prompt", PROMPT, "--device", "cpu"];
    let with = |flags: &[&str]| loramux(&[&prompt, flags].concat(), b"");
    let rank16 = adapter_flag("a", "llama.all-r16-rslora");
    let refused = with(&["--config", config, &rank16, "--lora", "a"]);
    assert_eq!(refused.exit, Exit::Refused, "{}", refused.stderr);
    assert!(refused.stderr.contains("max_lora_rank"), "{}", refused.stderr);
    let raised = with(&["--config", config, "--max-lora-rank", "16", &rank16, "--lora", "a"]);
    assert_eq!(raised.exit, Exit::Fine, "{}", raised.stderr);
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let prompt = ["generate", "--model", &llama(), "--prompt", PROMPT, "--device", "cpu"];
    for (yaml, part) in [
        ("max_batch_size: 0", "max_batch_size is 0"),
        ("max_num_tokens: 0", "max_num_tokens is 0"),
        ("tensor_parallel_size: 0", "tensor_parallel_size is 0"),
        (
            "tensor_parallel_size: 18446744073709551615",
            "tensor_parallel_size is 18446744073709551615",
        ),
        ("cuda_graph_config: {batch_sizes: [0]}", "cuda_graph_config.batch_sizes is [0]"),
        ("cuda_graph_config: {max_batch_size: 0}", "cuda_graph_config.max_batch_size is 0"),
        ("lora_config: {max_lora_rank: 0}", "max_lora_rank"),
        ("max_batch: 3", "max_batch"),
        ("tokenizer: /nowhere", "tokenizer is /nowhere"),
    ] {
        let file = settings(yaml);
        let words = [&prompt[..], &["--config", file.path().to_str().unwrap()]].concat();
        let outcome = loramux(&words, b"");
        assert_eq!(outcome.exit, Exit::Usage, "{yaml}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(part), "{yaml}: {}", outcome.stderr);
    }
}

#[test]
fn a_model_split_over_ranks_gives_the_same_tokens() {
    let flag = adapter_flag("a", "llama.attn-r8");
    let flags = [&flag, "--lora", "a", "--max-tokens", "6", "--ignore-eos"];
    let lines = json_lines(&[json!({"prompt": PROMPT})]);
    let answer = |flags: &[&str]| generate(flags, &lines);
    let (exit, alone) = answer(&flags);
    assert_eq!(exit, Exit::Fine);
    let split = answer(&[&flags[..], &["--tensor-parallel-size", "2"]].concat());
    assert_eq!((split.0, tokens(&split.1[0])), (Exit::Fine, tokens(&alone[0])));
}

#[test]
fn weights_and_cache_in_fp8_give_other_logits_than_16_bits() {
    let lines = json_lines(&[json!({"prompt": PROMPT, "sampling": {"logprobs": 1}})]);
    let first = |flags: &[&str]| {
        let (exit, answers) = generate(flags, &lines);
        assert_eq!(exit, Exit::Fine);
        answers[0]["outputs"][0]["logprobs"].to_string()
    };
    let plain = first(&[]);
    let weights = first(&["--quant-algo", "fp8"]);
    let cache = first(&["--kv-cache-dtype", "fp8"]);
    assert!(plain != weights && plain != cache && weights != cache);
    assert_eq!(plain, first(&["--quant-algo", "NO_QUANT"]));
}

#[test]
fn flags_hold_where_a_line_says_nothing_else() {
    let flag = adapter_flag("a", "llama.attn-r8");
    let flags = [&flag, "--lora", "a", "--max-tokens", "3", "--ignore-eos"];
    let lines = json_lines(&[
        json!({"prompt": PROMPT}),
        json!({"prompt": PROMPT, "sampling": {"max_tokens": 5}}),
        json!({"prompt": PROMPT, "lora": null}),
        json!({"prompt": PROMPT, "lora": "a"}),
        json!({"prompt": PROMPT, "lora_request": {"lora_name": "b", "lora_int_id": 7,
            "lora_path": adapter_path("llama.attn-r8")}}),
    ]);
    let (exit, answers) = generate(&flags, &lines);
    assert_eq!(exit, Exit::Fine);
    assert_eq!(answers.iter().map(|a| tokens(a).len()).collect::<Vec<_>>(), [3, 5, 3, 3, 3]);
    let names: Vec<&Value> = answers.iter().map(|answer| &answer["lora"]).collect();
    assert_eq!(names, [&json!("a"), &json!("a"), &Value::Null, &json!("a"), &json!("b")]);
    assert_eq!(tokens(&answers[1])[..3], tokens(&answers[0]));
    assert_ne!(tokens(&answers[2]), tokens(&answers[0]));
    assert_eq!(tokens(&answers[3]), tokens(&answers[0]));
    assert_eq!(tokens(&answers[4]), tokens(&answers[0]));
}

#[test]
fn logprobs_have_an_entry_for_each_token() {
    let lines = json_lines(&[
        json!({"prompt": PROMPT, "sampling": {"logprobs": 2, "prompt_logprobs": 0}}),
        json!({"prompt": PROMPT}),
    ]);
    let (_, answers) = generate(&["--max-tokens", "4", "--ignore-eos"], &lines);
    let output = &answers[0]["outputs"][0];
    let maps = output["logprobs"].as_array().unwrap();
    assert_eq!(maps.len(), 4);
    let mut sum = 0.0;
    for (map, token) in maps.iter().zip(tokens(&answers[0])) {
        let sampled = &map[token.to_string()];
        assert_eq!((map.as_object().unwrap().len(), &sampled["rank"]), (2, &json!(1)));
        sum += sampled["logprob"].as_f64().unwrap();
    }
    assert!((sum - output["cumulative_logprob"].as_f64().unwrap()).abs() < 1e-4);
    let prompt = answers[0]["prompt_logprobs"].as_array().unwrap();
    assert_eq!(prompt.len(), answers[0]["prompt_token_ids"].as_array().unwrap().len());
    assert!(prompt[0].is_null() && prompt[1].as_object().unwrap().len() == 1);
    assert!(answers[1]["outputs"][0]["logprobs"].is_null());
    assert!(answers[1]["outputs"][0]["cumulative_logprob"].is_null());
    assert!(answers[1]["prompt_logprobs"].is_null());
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let whole = generate(&["--ignore-eos"], &json_lines(&[json!({"prompt": PROMPT})])).1;
    let text = whole[0]["outputs"][0]["text"].as_str().unwrap();
    let stop: String = text.chars().skip(4).take(5).collect();
    let lines = json_lines(&[json!({"prompt": PROMPT, "sampling": {"stop": stop}})]);
    let (_, answers) = generate(&["--ignore-eos"], &lines);
    let output = &answers[0]["outputs"][0];
    assert_eq!(output["text"].as_str().unwrap(), text.split(&stop).next().unwrap());
    assert_eq!((&output["finish_reason"], &output["stop_reason"]), (&json!("stop"), &json!(stop)));
    let all = tokens(&whole[0]);
    let token = all[3];
    let flags = ["--ignore-eos", "--stop-token-id", &token.to_string()];
    let (_, answers) = generate(&flags, &json_lines(&[json!({"prompt": PROMPT})]));
    assert_eq!(answers[0]["outputs"][0]["stop_reason"], json!(token));
    let kept = all.iter().take_while(|id| **id != token).count();
    assert_eq!(tokens(&answers[0]), all[..kept]);
}

#[test]
fn a_seed_repeats_a_sample_and_n_outputs_are_numbered() {
    let sampling = json!({"temperature": 1.5, "seed": 5, "n": 3, "best_of": 4});
    let line = json!({"prompt": PROMPT, "sampling": sampling});
    let (_, answers) = generate(&["--max-tokens", "6"], &json_lines(&[line.clone(), line]));
    assert_eq!(answers[0]["outputs"], answers[1]["outputs"]);
    let outputs = answers[0]["outputs"].as_array().unwrap();
    let indices: Vec<&Value> = outputs.iter().map(|output| &output["index"]).collect();
    assert_eq!(indices, [&json!(0), &json!(1), &json!(2)]);
    assert_ne!(outputs[0]["token_ids"], outputs[1]["token_ids"]);
}

#[test]
fn a_single_prompt_is_written_as_plain_text() {
    let model = llama();
    let flag = adapter_flag("a", "llama.attn-r8");
    let words = ["generate", "--model", &model, "--dtype", "float32", "--prompt", PROMPT];
    let run = |more: &[&str]| loramux(&[&words[..], more].concat(), b"");
    let plain = run(&[&flag, "--lora", "a"]);
    assert_eq!(plain.exit, Exit::Fine);
    let answer: Value =
        serde_json::from_str(&run(&[&flag, "--lora", "a", "--output", "-"]).stdout).unwrap();
    assert_eq!(answer["lora"], "a");
    let text = answer["outputs"][0]["text"].as_str().unwrap();
    assert_eq!(plain.stdout, format!("{text}\n"));
    let several = run(&["--n", "2", "--temperature", "1"]);
    assert!(several.stdout.starts_with("[0] ") && several.stdout.contains("\n[1] "));
    let refused = run(&["--top-p", "3"]);
    assert_eq!((refused.exit, refused.stdout.trim()), (Exit::Usage, ""));
    assert!(refused.stderr.contains("`top_p` is 3"));
}

#[test]
fn requests_and_answers_may_be_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (requests, output, model) = (path("in"), path("out"), llama());
    let words = ["generate", "--model", &model, "--requests", &requests, "--output", &output];
    let missing = loramux(&words, b"");
    assert_eq!(missing.exit, Exit::Usage);
    assert!(missing.stderr.contains(&requests), "{}", missing.stderr);
    std::fs::write(&requests, json_lines(&[json!({"id": 1, "prompt": PROMPT})])).unwrap();
    let outcome = loramux(&words, b"");
    assert_eq!((outcome.exit, outcome.stdout.as_str()), (Exit::Fine, ""));
    assert!(std::fs::read_to_string(&output).unwrap().starts_with("{\"id\":1,"));
}

#[test]
fn a_guide_shapes_the_answer_and_a_broken_one_is_reported() {
    let guided = |guide: Value| json!({"prompt": PROMPT, "sampling": {"guided_decoding": guide}});
    let schema = json!({"enum": ["left", "right", 7]});
    let lines = json_lines(&[
        guided(json!({"json": schema})),
        guided(json!({"json": schema.to_string()})),
        guided(json!({"regex": "(a"})),
        guided(json!({"json": schema, "regex": "a"})),
        guided(json!({"regex": "[xy]{3}"})),
        guided(Value::Null),
    ]);
    let (exit, answers) = generate(&["--temperature", "2"], &lines);
    assert_eq!(exit, Exit::Refused);
    let text = |answer: &Value| answer["outputs"][0]["text"].as_str().unwrap().to_owned();
    for answer in &answers[..2] {
        let value: Value = serde_json::from_str(&text(answer)).unwrap();
        assert!(schema["enum"].as_array().unwrap().contains(&value), "{value}");
        assert_eq!(answer["outputs"][0]["finish_reason"], "stop");
    }
    for (answer, named) in answers[2..4].iter().zip(["guided_decoding.regex", "exactly one"]) {
        let error = answer["error"].as_str().unwrap();
        assert!(error.contains(named), "{named} is not in: {error}");
    }
    let three = text(&answers[4]);
    assert!(three.len() == 3 && three.chars().all(|c| "xy".contains(c)), "{three}");
    assert!(answers[5]["outputs"].is_array());
}
