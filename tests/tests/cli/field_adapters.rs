//! `inspect --model` on the adapters of the field fixtures: it accepts those that are served, and says how
//! full weights are interpreted.

use loramux::Exit;
use loramux_tests::{AdapterFiles, FileTensor, dense_field_cases, field_dir, field_model};
use serde_json::Value;

use super::support::loramux;

fn adapter(name: &str) -> String {
    field_dir().join("adapters").join(name).display().to_string()
}

fn inspect(words: &[&str]) -> (Exit, String) {
    let outcome = loramux(&[&["inspect"], words].concat(), b"");
    (outcome.exit, outcome.stdout + &outcome.stderr)
}

#[test]
fn every_adapter_that_is_served_is_accepted() {
    let cases = dense_field_cases().into_values().flatten();
    let mut names: Vec<_> =
        cases.filter_map(|case| Some((case.case.adapter?, case.case.model))).collect();
    names.sort();
    names.dedup();
    assert!(names.len() > 40, "{} adapters", names.len());
    for (name, model) in names {
        let model = field_model(&model).display().to_string();
        let (exit, text) = inspect(&[&adapter(&name), "--model", &model]);
        assert_eq!(exit, Exit::Fine, "{name}: {text}");
    }
}

#[test]
fn what_whole_weights_do_is_reported_and_without_the_model_that_it_depends_on_it() {
    let saved = adapter("llama.saved-superset");
    let model = field_model("llama").display().to_string();
    let (exit, text) = inspect(&[&saved, "--model", &model]);
    assert_eq!(exit, Exit::Fine);
    assert!(text.contains("note: ") && text.contains("model's weight"), "{text}");
    assert!(!text.contains("depends on the model"), "{text}");
    let (exit, text) = inspect(&[&saved]);
    assert_eq!(exit, Exit::Fine);
    assert!(text.contains("depends on the model"), "{text}");
    let (_, json) = inspect(&[&saved, "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert!(json["notes"][0].as_str().unwrap().contains("depends on the model"), "{json}");
}

#[test]
fn a_model_without_weights_cannot_be_compared_with() {
    let model = tempfile::tempdir().unwrap();
    let config = field_model("llama").join("config.json");
    std::fs::copy(config, model.path().join("config.json")).unwrap();
    let model = model.path().to_str().unwrap();
    let (exit, text) = inspect(&[&adapter("llama.saved-superset"), "--model", model]);
    assert_eq!(exit, Exit::Model, "{text}");
    let (exit, text) = inspect(&[&adapter("llama.control-list"), "--model", model]);
    assert_eq!(exit, Exit::Fine, "{text}");
}

/// An adapter with the whole weight of a norm and LoRA pairs.
fn with_norm(dir: &std::path::Path, name: &str) -> String {
    let mut files = AdapterFiles::open("llama.attn-r8");
    let name = format!("base_model.model.model.{name}.weight");
    files.tensors.insert(name, FileTensor::filled(&[64], 1.5));
    files.write(dir);
    dir.display().to_string()
}

#[test]
fn a_weight_for_a_place_that_the_model_lacks_is_the_adapters_fault() {
    let model = field_model("llama").display().to_string();
    for (name, code) in [
        ("layers.9.input_layernorm", "layer-out-of-range"),
        ("layers.1.self_attn.q_norm", "module-not-in-model"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (exit, text) = inspect(&[&with_norm(dir.path(), name), "--model", &model]);
        assert_eq!(exit, Exit::Refused, "{text}");
        assert!(text.contains(code), "{name}: {text}");
    }
}
