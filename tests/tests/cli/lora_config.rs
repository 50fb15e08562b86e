//! `--lora-config`: LoRA settings from a file.

use std::path::Path;

use loramux::Exit;
use loramux_tests::adapter_path;
use serde_json::{Value, json};

use super::support::{Copy, Outcome, adapter_flag, generate, json_lines, llama, loramux};

/// Writes a file of settings and returns its path.
fn settings(dir: &Path, content: &Value) -> String {
    let path = dir.join("lora.json");
    std::fs::write(&path, content.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Inspects an adapter against the model `llama`.
fn inspect(adapter: &Path, flags: &[&str]) -> Outcome {
    let model = llama();
    let words = ["inspect", adapter.to_str().unwrap(), "--model", &model];
    loramux(&[&words[..], flags].concat(), b"")
}

/// Answers one request with an adapter.
fn ask(adapter: &str, flags: &[&str]) -> Value {
    let flags = [&[adapter, "--lora", "a", "--max-tokens", "3", "--ignore-eos"], flags].concat();
    generate(&flags, &json_lines(&[json!({"prompt": "Hi there"})])).1.remove(0)
}

/// The error about an adapter that cannot be served: before the model is loaded if headers suffice to see it, else in
/// the answer.
fn refusal(adapter: &str) -> String {
    let model = llama();
    let words = ["generate", "--model", &model, "--requests", "-", "--dtype", "float32", adapter];
    let outcome = loramux(&words, b"{\"prompt\": \"x\", \"lora\": \"a\"}\n");
    assert_eq!(outcome.exit, Exit::Refused);
    outcome.stdout + &outcome.stderr
}

#[test]
fn what_a_remedy_allows_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let copy = |name: &str| Copy::new(dir.path(), name);
    let odd = copy("odd").with_config("lora_magic", json!(3)).path();
    let idle = copy("idle").with_tensors("lora_B", |tensor| tensor.bytes.fill(0)).path();
    for (path, field) in [(odd, "allow_unknown_fields"), (idle, "allow_noop_adapter")] {
        let flag = format!("--adapter=a={}", path.display());
        let remedy = format!("set {field}: true");
        let refused = inspect(&path, &[]);
        assert_eq!(refused.exit, Exit::Refused);
        assert!(refused.stdout.contains(&remedy), "{}", refused.stdout);
        assert!(refusal(&flag).contains(&remedy));

        let file = settings(dir.path(), &json!({field: true}));
        let flags = ["--lora-config", file.as_str()];
        assert_eq!(inspect(&path, &flags).exit, Exit::Fine, "{field}");
        assert!(ask(&flag, &flags)["outputs"].is_array(), "{field}");
    }
}

#[test]
fn target_modules_restrict_what_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let attention = adapter_path("llama.attn-r8");
    for content in [json!({"lora_target_modules": ["attn_q"]}), json!({"lora_dir": [attention]})] {
        let file = settings(dir.path(), &content);
        let flags = ["--lora-config", file.as_str()];
        let refused = inspect(&adapter_path("llama.all-r16-rslora"), &flags);
        assert_eq!(refused.exit, Exit::Refused, "{content}");
        assert!(refused.stdout.contains("module-not-served"), "{}", refused.stdout);
        let answer = ask(&adapter_flag("a", "llama.all-r16-rslora"), &flags);
        assert!(answer["error"].as_str().unwrap().contains("lora_target_modules"), "{answer}");
    }
    assert_eq!(
        inspect(&attention, &["--lora-config", &settings(dir.path(), &json!({}))]).exit,
        Exit::Fine
    );
}

#[test]
fn a_flag_overrides_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = settings(dir.path(), &json!({"max_lora_rank": 4}));
    let flag = adapter_flag("a", "llama.attn-r8");
    let flags = ["--lora-config", file.as_str()];
    let path = adapter_path("llama.attn-r8");
    assert!(inspect(&path, &flags).stdout.contains("ranks up to 4"));
    assert!(ask(&flag, &flags)["error"].as_str().unwrap().contains("ranks up to 4"));
    let flags = [&flags[..], &["--max-lora-rank", "8"]].concat();
    assert_eq!(inspect(&path, &flags).exit, Exit::Fine);
    assert!(ask(&flag, &flags)["outputs"].is_array());
}

#[test]
fn a_file_turns_lora_on() {
    let dir = tempfile::tempdir().unwrap();
    let absent = dir.path().join("absent");
    let file = settings(dir.path(), &json!({"lora_dir": [absent]}));
    let model = llama();
    let words = ["generate", "--model", &model, "--prompt", "x", "--lora-config", &file];
    let outcome = loramux(&words, b"");
    assert_eq!(outcome.exit, Exit::Usage);
    assert!(outcome.stderr.contains("absent"), "{}", outcome.stderr);
    let outcome = inspect(&adapter_path("llama.attn-r8"), &["--lora-config", &file]);
    assert_eq!(outcome.exit, Exit::Usage);
    assert!(outcome.stderr.contains("lora_dir"), "{}", outcome.stderr);
}

#[test]
fn a_file_that_cannot_be_used_is_named_with_its_field() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = adapter_path("llama.attn-r8");
    for (content, part) in [
        (json!({"max_rank": 8}), "unknown field `max_rank`"),
        (json!({"max_loras": "8"}), "max_loras: invalid type"),
        (json!({"max_loras": 0}), "max_loras: found 0"),
        (json!({"lora_target_modules": ["q_proj"]}), "q_proj"),
        (json!([]), "no JSON object"),
    ] {
        let file = settings(dir.path(), &content);
        let model = llama();
        let words = ["generate", "--model", &model, "--prompt", "x", "--lora-config", &file];
        for outcome in [loramux(&words, b""), inspect(&adapter, &["--lora-config", &file])] {
            assert_eq!((outcome.exit, outcome.stdout.as_str()), (Exit::Usage, ""), "{content}");
            let error = outcome.stderr;
            assert!(error.contains(&file) && error.contains(part), "{content}: {error}");
        }
    }
    let absent = dir.path().join("absent.json").to_str().unwrap().to_owned();
    let outcome = inspect(&adapter, &["--lora-config", &absent]);
    assert_eq!(outcome.exit, Exit::Usage);
    assert!(outcome.stderr.contains(&absent), "{}", outcome.stderr);
}

#[test]
fn the_help_of_both_commands_shows_a_file() {
    for command in ["generate", "inspect"] {
        let help = loramux(&[command, "--help"], b"").stdout;
        assert!(help.contains("--lora-config <FILE.json>"), "{help}");
        assert!(help.contains("\"allow_unknown_fields\": true"), "{help}");
    }
}
