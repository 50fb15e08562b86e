//! Adapters named on the command line are checked before the model is loaded.

use std::os::unix::fs::symlink;

use super::program::{SHORT, fixture, generate, ids, run, text};

#[test]
fn an_adapter_that_cannot_be_served_is_reported_before_the_model_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), "{\"peft_type\": \"LOHA\"}").unwrap();
    let refused = dir.path().to_str().unwrap();
    for (path, code, part) in [("absent", 2, "absent"), (refused, 1, "LOHA")] {
        let flag = format!("a={path}");
        let output = run(&mut generate(&["--requests", "-", "--adapter", &flag]), SHORT);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains("adapter \"a\"") && stderr.contains(part), "{stderr}");
        assert!(!stderr.contains("memory: ") && output.stdout.is_empty(), "{stderr}");
    }
}

#[test]
fn a_folder_of_adapters_names_each_by_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["one", "two"] {
        symlink(fixture("adapters/llama.attn-r8"), dir.path().join(name)).unwrap();
    }
    let lines = r#"{"id": 1, "input_ids": [5], "lora": "one"}
{"id": 2, "input_ids": [5], "lora": "two"}
{"id": 3, "input_ids": [5], "lora": "three"}
{"id": 4, "input_ids": [5], "lora_request": {"lora_name": "one", "lora_int_id": 9, "lora_path": "/"}}
"#;
    let words =
        ["--requests", "-", "--max-tokens", "2", "--adapters", dir.path().to_str().unwrap()];
    let output = run(&mut generate(&words), lines);
    let (answers, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!((output.status.code(), ids(&answers).len()), (Some(1), 4), "{stderr}");
    let lines: Vec<&str> = answers.lines().collect();
    assert!(lines[0].contains("\"lora\":\"one\"") && lines[1].contains("\"lora\":\"two\""));
    assert!(lines[2].contains("known: one, two"), "{answers}");
    assert!(lines[3].contains("already used"), "{answers}");
    assert!(stderr.contains("failed: line 3 (id 3)"), "{stderr}");
}
