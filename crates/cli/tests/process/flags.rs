//! Flag files, verbosity, and sampling parameters.

use serde_json::Value;

use super::program::{SHORT, fixture, generate, loramux, run, text};

#[test]
fn a_flag_file_is_replaced_by_its_flags() {
    let dir = tempfile::tempdir().unwrap();
    let flags = dir.path().join("flags");
    let model = fixture("models/llama");
    let content = format!("generate --model '{}'\n# lines\n--requests -\n", model.display());
    std::fs::write(&flags, content).unwrap();
    let file = format!("@{}", flags.display());
    let output = run(&mut loramux(&[&file, "--device", "cpu"]), SHORT);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let output = run(&mut loramux(&["@absent"]), "");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("@absent"));
}

#[test]
fn verbosity_follows_the_flags_and_rust_log() {
    let run_with = |flags: &[&str], variable: Option<&str>| {
        let mut command = generate(&[&["--requests", "-"], flags].concat());
        if let Some(value) = variable {
            command.env("RUST_LOG", value);
        }
        let output = run(&mut command, SHORT);
        (output.status.code(), text(&output.stderr))
    };
    let (code, usual) = run_with(&[], None);
    assert_eq!(code, Some(0));
    let starts: Vec<&str> = usual.lines().map(|l| l.split(':').next().unwrap()).collect();
    assert_eq!(starts, ["device", "memory", "sampling", "summary"], "{usual}");
    assert_eq!(run_with(&["-q"], None), (Some(0), String::new()));
    assert!(run_with(&["-v"], None).1.contains("line 1 is read"));
    assert!(run_with(&[], Some("info")).1.contains("line 1 is read"));
    assert!(!run_with(&["-v"], Some("error")).1.contains("line 1 is read"));
    let (code, wrong) = run_with(&[], Some("loramux=loud"));
    assert!(code == Some(2) && wrong.contains("RUST_LOG"), "{wrong}");
}

#[test]
fn a_generated_seed_is_reported_and_repeats_the_answer() {
    let ask = |seed: Option<u64>| -> Value {
        let seed = seed.map(|seed| format!(", \"seed\": {seed}")).unwrap_or_default();
        let sampling = format!("{{\"temperature\": 1.5, \"max_tokens\": 12{seed}}}");
        let line = format!("{{\"input_ids\": [5, 6], \"sampling\": {sampling}}}\n");
        let output = run(&mut generate(&["--requests", "-"]), &line);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let first = ask(None);
    let again = ask(first["seed"].as_u64());
    assert_eq!(first, again);
    assert_ne!(ask(None)["outputs"], first["outputs"]);
}

#[test]
fn a_bias_forces_and_forbids_tokens() {
    let line = |bias: &str| {
        format!(
            "{{\"input_ids\": [5, 6], \"max_tokens\": 2, \"sampling\": {{\"logit_bias\": {bias}}}}}\n"
        )
    };
    let lines = [line(r#"{"77": 100}"#), line("{}"), line(r#"{"512": 1}"#)].concat();
    let output = run(&mut generate(&["--requests", "-", "--ignore-eos"]), &lines);
    let answers: Vec<Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let tokens = |answer: &Value| answer["outputs"][0]["token_ids"].to_string();
    assert_eq!(tokens(&answers[0]), "[77,77]");
    assert_ne!(tokens(&answers[1]), "[77,77]");
    assert!(answers[2]["error"].as_str().unwrap().contains("logit_bias"), "{}", answers[2]);
    let free = answers[1]["outputs"][0]["token_ids"][0].as_u64().unwrap();
    let forbidden = line(&format!("{{\"{free}\": -100}}"));
    let output = run(&mut generate(&["--requests", "-", "--ignore-eos"]), &forbidden);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_ne!(answer["outputs"][0]["token_ids"][0].as_u64().unwrap(), free);
}

#[test]
fn the_models_sampling_defaults_are_used_on_request() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("models/llama")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let ask = |flags: &[&str]| {
        let words = ["generate", "--device", "cpu", "--requests", "-", "--ignore-eos", "--model"];
        let mut command = loramux(&words);
        run(command.arg(dir.path()).args(flags), "{\"input_ids\": [5, 6]}\n")
    };
    let config = dir.path().join("generation_config.json");
    let _ = std::fs::remove_file(&config);
    let model = ["--sampling-defaults", "model"];
    let output = ask(&model);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("generation_config.json"));
    std::fs::write(&config, r#"{"do_sample": true, "temperature": 0.5, "max_new_tokens": 3}"#)
        .unwrap();
    let output = ask(&model);
    assert!(text(&output.stderr).contains("generation_config.json: temperature 0.5"));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["outputs"][0]["token_ids"].as_array().unwrap().len(), 3);
    assert!(answer["seed"].is_u64());
    let output = ask(&[]);
    assert!(text(&output.stderr).contains("loramux's defaults"), "{}", text(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["outputs"][0]["token_ids"].as_array().unwrap().len(), 32);
}
