//! An error has the same exit code in every command, and the documents list all codes.

use super::program::{fixture, loramux, run, text};

#[test]
fn a_missing_or_refused_adapter_has_the_same_code_in_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let (refused, copy) = (dir.path().join("refused"), dir.path().join("copy"));
    std::fs::create_dir(&refused).unwrap();
    std::fs::write(refused.join("adapter_config.json"), "{\"peft_type\": \"LOHA\"}").unwrap();
    let absent = dir.path().join("absent");
    let model = fixture("models/llama");
    let (model, copy) = (model.to_str().unwrap(), copy.to_str().unwrap());
    for (path, code) in [(&absent, 2), (&refused, 1)] {
        let path = path.to_str().unwrap();
        let adapter = format!("a={path}");
        for words in [
            vec!["inspect", path],
            vec!["diff", path, path],
            vec!["convert", path, copy, "--to", "peft"],
            vec!["generate", "--model", model, "--prompt", "x", "--adapter", &adapter],
        ] {
            let output = run(&mut loramux(&words), "");
            assert_eq!(output.status.code(), Some(code), "{words:?}: {}", text(&output.stderr));
        }
    }
}

#[test]
fn the_documents_and_the_help_list_the_same_codes() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/command-line.md");
    let page = std::fs::read_to_string(page).unwrap();
    let help = text(&run(&mut loramux(&["--help"]), "").stdout);
    let listed = help.split("Exit codes:\n").nth(1).unwrap();
    let mut codes = 0;
    for line in listed.lines().filter(|line| !line.trim().is_empty()) {
        let (code, meaning) = line.trim().split_once(' ').unwrap();
        let row = format!("| {code} | {} |", meaning.trim());
        assert!(page.contains(&row), "{row}");
        codes += 1;
    }
    assert_eq!(codes, 7);
}
