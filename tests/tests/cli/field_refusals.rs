//! Every entry of `fixtures/field/refusals.json`: files that users pass by mistake, and the required output
//! of `inspect`.

use std::path::{Path, PathBuf};

use loramux::Exit;
use loramux_tests::{adapter_path, model_path};
use serde::Deserialize;
use serde_json::{Value, json};

use super::support::loramux;

/// Described in the README beside the file.
#[derive(Deserialize)]
struct Entry {
    id: String,
    adapter: String,
    model: String,
    exit: Vec<u8>,
    words: Vec<Vec<String>>,
}

fn field() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/field")
}

/// How the output for an entry differs from what it asks for; `None` if it does not.
fn fault(entry: &Entry) -> Option<String> {
    let adapter = field().join(&entry.adapter);
    let model = if entry.model.contains('/') {
        field().join(&entry.model)
    } else {
        model_path(&entry.model)
    };
    let paths = [adapter, model];
    let outcome = loramux(&["inspect", paths[0].to_str()?, "--model", paths[1].to_str()?], b"");
    let output = without(&(outcome.stdout + &outcome.stderr), &paths);
    let missing: Vec<_> =
        entry.words.iter().filter(|any| !any.iter().any(|word| output.contains(word))).collect();
    let right = missing.is_empty() && entry.exit.contains(&(outcome.exit as u8));
    (!right).then(|| format!("{}: {:?}, without {missing:?}: {output}", entry.id, outcome.exit))
}

/// Output in lower case, without the paths of the command line and their last components.
fn without(output: &str, paths: &[PathBuf]) -> String {
    let mut output = output.to_owned();
    for path in paths {
        output = output.replace(path.to_str().unwrap(), "");
    }
    for path in paths {
        output = output.replace(path.file_name().unwrap().to_str().unwrap(), "");
    }
    output.to_lowercase()
}

#[test]
fn what_people_hand_over_by_mistake_is_named() {
    let text = std::fs::read_to_string(field().join("refusals.json")).unwrap();
    let entries: Vec<Entry> = serde_json::from_str(&text).unwrap();
    assert_eq!(entries.len(), 26);
    let faults: Vec<String> = entries.iter().filter_map(fault).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n\n"));
}

fn report(adapter: &Path, model: &Path) -> (Exit, Value) {
    let [adapter, model] = [adapter, model].map(|path| path.to_str().unwrap());
    let outcome = loramux(&["inspect", "--json", adapter, "--model", model], b"");
    (outcome.exit, serde_json::from_str(&outcome.stdout).unwrap())
}

#[test]
fn another_vocabulary_is_reported_as_such_and_once() {
    let larger = field().join("models/llama520");
    let resized = field().join("adapters/llama520.resized-lm_head-lora");
    let cases = [
        (adapter_path("llama.lm-head-r8"), &larger),
        (adapter_path("llama.embed-r8"), &larger),
        (adapter_path("llama.saved-head"), &larger),
        (resized, &model_path("llama")),
    ];
    for (adapter, model) in cases {
        let (exit, report) = report(&adapter, model);
        assert_eq!(exit, Exit::Refused);
        let [only] = &report["rejections"].as_array().unwrap()[..] else { panic!("{report}") };
        assert_eq!(only["code"], "vocabulary-mismatch");
        for size in ["512 tokens", "520 tokens"] {
            assert!(only.to_string().contains(size), "{only}");
        }
    }
}

#[test]
fn the_json_form_has_the_faults_of_the_model_too() {
    let adapter = field().join("adapters/llama.control-list");
    let (exit, refused) = report(&adapter, &field().join("refusals/packed-nf4"));
    assert_eq!((exit, &refused["accepted"]), (Exit::Refused, &json!(false)));
    assert_eq!(refused["rejections"][0]["code"], "unsupported-model");
    // The adapter is still described.
    assert_eq!(refused["modules"][0]["module"], "attn_q");
    let (exit, warned) = report(&adapter, &field().join("refusals/adapter-in-model"));
    assert_eq!((exit, &warned["accepted"]), (Exit::Fine, &json!(true)));
    assert!(warned["warnings"][0].as_str().unwrap().contains("adapter_config.json"));
}

#[test]
fn other_commands_refuse_such_a_model_as_generate_does() {
    let model = field().join("refusals/packed-int4-grouped");
    let [model, adapter] = [model, field().join("adapters/llama.control-list")];
    let [model, adapter] = [&model, &adapter].map(|path| path.to_str().unwrap());
    for words in [
        &["generate", "--prompt", "x", "--model", model][..],
        &["diff", adapter, adapter, "--model", model],
    ] {
        let outcome = loramux(words, b"");
        assert_eq!(outcome.exit, Exit::Model, "{}", outcome.stderr);
        assert!(outcome.stderr.contains("gptq"), "{}", outcome.stderr);
    }
}
