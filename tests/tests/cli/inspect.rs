//! `loramux inspect`.

use loramux::Exit;
use loramux_tests::{adapter_path, fixtures_dir};
use serde_json::{Value, json};

use super::support::{Copy, llama, loramux};

fn inspect(fixture: &str, flags: &[&str]) -> (Exit, String) {
    let path = adapter_path(fixture);
    let words = [&["inspect", path.to_str().unwrap()][..], flags].concat();
    let outcome = loramux(&words, b"");
    assert_eq!(outcome.stderr, "");
    (outcome.exit, outcome.stdout)
}

/// The words of each line.
fn rows(text: &str) -> Vec<Vec<&str>> {
    text.lines().map(|line| line.split_whitespace().collect()).collect()
}

#[test]
fn an_adapter_is_described_by_module_layers_rank_and_scale() {
    let (exit, text) = inspect("llama.mixed-ranks", &["--model", &llama()]);
    assert_eq!(exit, Exit::Fine);
    let rows = rows(&text);
    assert!(rows.contains(&vec!["attn_q", "layers", "0-2", "rank", "12", "scale", "0.5"]));
    assert!(rows.contains(&vec!["attn_k", "layers", "0-2", "rank", "4", "scale", "2"]));
    assert!(
        rows.contains(&vec!["PEFT", "0.21.2"]) && rows.contains(&vec!["base", "model", "llama"])
    );
    assert!(text.contains("no rule is broken"));
}

#[test]
fn what_goes_beyond_a_low_rank_update_is_reported() {
    for (fixture, words) in [
        ("llama.dora-r8", "DoRA"),
        ("llama.lora-bias", "bias of lora_B"),
        ("llama.saved-head", "replaces the weight"),
        ("qwen2.bias-lora-only", "replaces the bias"),
        ("llama.some-layers", "layers "),
        ("llama.embed-r8", "embed_tokens"),
    ] {
        let (exit, text) = inspect(fixture, &[]);
        assert_eq!(exit, Exit::Fine);
        assert!(text.contains(words), "{fixture}: {text}");
    }
}

#[test]
fn the_json_form_has_the_same_facts() {
    let (exit, text) = inspect("llama.attn-r8", &["--json", "--model", &llama()]);
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((exit, &report["accepted"]), (Exit::Fine, &json!(true)));
    assert_eq!(report["rejections"], json!([]));
    assert_eq!(report["generation"].as_str().unwrap().len(), 64);
    let module = &report["modules"][0];
    assert_eq!((&module["module"], &module["layers"]), (&json!("attn_q"), &json!([0, 1, 2])));
    assert_eq!((&module["rank"], &module["scale"]), (&json!(8), &json!(2.0)));
}

#[test]
fn an_adapter_of_another_model_is_refused_with_every_rule_in_json() {
    let (exit, text) = inspect("qwen3.attn-r8", &["--model", &llama()]);
    assert_eq!(exit, Exit::Refused);
    assert!(text.contains("refused [shape-mismatch]") && text.contains("remedy"));
    assert!(text.contains("more [shape-mismatch]; --json lists all"));
    let (exit, text) = inspect("qwen3.attn-r8", &["--json", "--model", &llama()]);
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((exit, &report["accepted"]), (Exit::Refused, &json!(false)));
    let rejections = report["rejections"].as_array().unwrap();
    assert!(rejections.len() > 3);
    assert!(rejections.iter().all(|rejection| rejection["code"] == "shape-mismatch"));
}

#[test]
fn the_rank_limit_holds_with_a_model_and_without() {
    for flags in [&["--max-lora-rank", "4"][..], &["--max-lora-rank", "4", "--model", &llama()]] {
        let (exit, text) = inspect("llama.attn-r8", flags);
        assert_eq!(exit, Exit::Refused);
        assert!(text.contains("[rank-over-limit]") && text.contains("to 8 or more"), "{text}");
    }
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let cut = Copy::new(dir.path(), "cut").truncated();
    let kind = Copy::new(dir.path(), "kind").with_config("peft_type", json!("VERA"));
    for (path, words) in [(cut.path(), "adapter_model.safetensors"), (kind.path(), "VERA")] {
        let outcome = loramux(&["inspect", path.to_str().unwrap()], b"");
        assert_eq!(outcome.exit, Exit::Refused);
        assert!(outcome.stdout.contains(words), "{}", outcome.stdout);
        let outcome = loramux(&["inspect", "--json", path.to_str().unwrap()], b"");
        let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
        assert_eq!(report["accepted"], json!(false));
    }
    let model = dir.path().to_str().unwrap();
    let outcome = loramux(&["inspect", model, "--model", model], b"");
    assert_eq!(outcome.exit, Exit::Model);
    assert!(outcome.stderr.contains("config.json"), "{}", outcome.stderr);
}

/// Inspects an adapter of `fixtures/field` that has its own tokenizer.
fn inspect_text(fixture: &str, flags: &[&str]) -> (Exit, String) {
    let path = fixtures_dir().join("field/adapters").join(fixture);
    let outcome = loramux(&[&["inspect", path.to_str().unwrap()][..], flags].concat(), b"");
    (outcome.exit, outcome.stdout)
}

#[test]
fn differences_of_an_adapters_own_text_files_are_reported() {
    let base = fixtures_dir().join("field/models/llama520").to_str().unwrap().to_owned();
    for (fixture, model, lines) in [
        ("llama.own-eos", &llama(), &["chat template: the adapter's", "end tokens: 2, 278"][..]),
        ("llama520.own-template", &base, &["chat template: the adapter's, of chat_template.jinja"]),
        ("llama520.added-tokens", &base, &["added tokens: <tool> (512), <result> (513)"]),
    ] {
        let (exit, text) = inspect_text(fixture, &["--model", model]);
        assert_eq!(exit, Exit::Fine, "{text}");
        assert!(lines.iter().all(|line| text.contains(line)), "{fixture}: {text}");
        let (exit, text) = inspect_text(fixture, &[]);
        assert!(exit == Exit::Fine && text.contains("add --model"), "{text}");
    }
    let (_, json) = inspect_text("llama.own-eos", &["--model", &llama(), "--json"]);
    let report: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["text"]["taken"]["end_tokens"], json!([2, 278]));
}

#[test]
fn tokens_that_the_model_lacks_are_refused_and_the_setting_is_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--model", &llama()];
    let (exit, text) = inspect_text("llama520.added-tokens", &flags);
    assert_eq!(exit, Exit::Refused);
    assert!(text.contains("tokens-without-rows") && text.contains("<tool> (512)"), "{text}");
    let file = dir.path().join("lora.json");
    std::fs::write(&file, r#"{"adapter_tokenizer": "base"}"#).unwrap();
    let flags = [&flags[..], &["--lora-config", file.to_str().unwrap()]].concat();
    let (exit, text) = inspect_text("llama520.added-tokens", &flags);
    assert!(exit == Exit::Fine && !text.contains("beside the weights"), "{text}");
}
