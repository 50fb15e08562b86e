//! The program `polylora` as its users meet it: words and streams in, streams and an exit code out.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bad_input;
mod generate;
mod inspect;
mod support;

use cli::Exit;
use support::polylora;

#[test]
fn help_is_not_an_error_and_a_wrong_word_is_one_of_usage() {
    let help = polylora(&["--help"], b"");
    assert_eq!(help.exit, Exit::Fine);
    assert!(help.stdout.contains("Exit codes") && help.stderr.is_empty());
    let wrong = polylora(&["generat"], b"");
    assert_eq!(wrong.exit, Exit::Usage);
    assert!(wrong.stderr.contains("generat") && wrong.stdout.is_empty());
}

#[test]
fn a_demo_without_adapters_names_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let outcome = polylora(&["demo", "--adapters", path], b"");
    assert_eq!(outcome.exit, Exit::Usage);
    assert!(outcome.stderr.contains(path) && outcome.stderr.contains("--adapters"));
}
