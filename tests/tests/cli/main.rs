//! The command line program: arguments and streams, output and exit codes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bad_input;
mod convert;
mod convert_nemo;
mod field_adapters;
mod field_refusals;
mod generate;
mod hostile;
mod inspect;
mod inspect_snapshots;
mod lora_config;
mod support;
mod trainers;

use loramux::Exit;
use support::loramux;

#[test]
fn help_is_not_an_error_and_a_wrong_word_is_one_of_usage() {
    let help = loramux(&["--help"], b"");
    assert_eq!(help.exit, Exit::Fine);
    assert!(help.stdout.contains("Exit codes") && help.stderr.is_empty());
    let wrong = loramux(&["generat"], b"");
    assert_eq!(wrong.exit, Exit::Usage);
    assert!(wrong.stderr.contains("generat") && wrong.stdout.is_empty());
}

#[test]
fn a_demo_without_adapters_names_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let outcome = loramux(&["demo", "--adapters", path], b"");
    assert_eq!(outcome.exit, Exit::Usage);
    assert!(outcome.stderr.contains(path) && outcome.stderr.contains("--adapters"));
}

#[test]
fn the_demo_shows_what_each_adapter_makes_of_a_question() {
    let model = loramux::model_fetch::cached_model_path().unwrap();
    if !model.is_file() {
        eprintln!("SKIPPED the demo: its model is not in the cache; run `loramux demo` once");
        return;
    }
    let demo = loramux(&["demo", "--max-tokens", "16"], b"");
    assert_eq!(demo.exit, Exit::Fine, "{}", demo.stderr);
    for part in ["(base model)", "Arr!", "{\"answer\":", "SELECT title FROM books", "THE "] {
        assert!(demo.stdout.contains(part), "{part}: {}", demo.stdout);
    }
    assert!(demo.stdout.contains("batch of 15, 4 adapters"), "{}", demo.stdout);
    assert!(demo.stderr.contains("[15/15]"));
}
