//! `loramux convert` and `loramux diff`.

use std::path::Path;

use loramux::Exit;
use loramux_tests::adapter_path;
use serde_json::{Value, json};

use super::support::{Copy, Outcome, llama, loramux};

pub fn convert(input: &Path, output: &Path, flags: &[&str]) -> Outcome {
    let words = ["convert", input.to_str().unwrap(), output.to_str().unwrap()];
    loramux(&[&words[..], flags].concat(), b"")
}

pub fn diff(one: &Path, other: &Path, flags: &[&str]) -> Outcome {
    let words = ["diff", one.to_str().unwrap(), other.to_str().unwrap()];
    loramux(&[&words[..], flags].concat(), b"")
}

#[test]
fn layouts_are_converted_verified_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let source = adapter_path("mixtral.experts-r4");
    for (to, layout) in [
        ("peft", "routed experts target-parameters"),
        ("peft-target-parameters", "routed experts target-parameters"),
        ("stacked", "routed experts stacked"),
        ("per-expert", "routed experts per-expert"),
    ] {
        let copy = dir.path().join(to);
        let outcome = convert(&source, &copy, &["--to", to]);
        assert_eq!(outcome.exit, Exit::Fine, "{}", outcome.stderr);
        let lines: Vec<&str> = outcome.stdout.lines().collect();
        assert!(lines[0].starts_with("read ") && lines[0].contains("target-parameters"));
        assert!(lines[1].contains(copy.to_str().unwrap()) && lines[1].contains(layout));
        assert!(lines[2].contains("12 modules"), "{}", lines[2]);
        let same = diff(&source, &copy, &["--tolerance", "0"]);
        assert_eq!(same.exit, Exit::Fine, "{}", same.stdout);
        assert!(same.stdout.starts_with("the same: 75 updates (tolerance 0)"), "{}", same.stdout);
    }
}

#[test]
fn a_layout_that_files_do_not_show_is_pointed_out() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy");
    let flags = ["--to", "peft", "--moe-layout", "unsloth-expert-slowest"];
    let outcome = convert(&adapter_path("mixtral.experts-r4"), &copy, &flags);
    assert_eq!(outcome.exit, Exit::Fine, "{}", outcome.stderr);
    assert!(outcome.stdout.contains("set moe_layout to unsloth-expert-slowest"));
    // Read in this layout, the experts differ from PEFT's.
    let other = dir.path().join("other");
    let flags = ["--to", "stacked", "--moe-layout", "unsloth-expert-slowest"];
    assert_eq!(convert(&copy, &other, &flags).exit, Exit::Fine);
    let differs = diff(&adapter_path("mixtral.experts-r4-stacked"), &other, &[]);
    assert_eq!(differs.exit, Exit::Refused);
    assert!(differs.stdout.contains("expert 7"), "{}", differs.stdout);
}

#[test]
fn a_dense_adapter_is_converted_for_its_model() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy");
    let outcome =
        convert(&adapter_path("llama.mixed-ranks"), &copy, &["--to", "peft", "--model", &llama()]);
    assert_eq!(outcome.exit, Exit::Fine, "{}", outcome.stderr);
    let inspected = loramux(&["inspect", copy.to_str().unwrap(), "--model", &llama()], b"");
    assert_eq!(inspected.exit, Exit::Fine, "{}", inspected.stdout);
}

#[test]
fn refusals_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let llama = llama();
    let broken = Copy::new(dir.path(), "broken").with_config("peft_type", json!("LOHA")).path();
    let absent = dir.path().join("absent");
    let dora = adapter_path("llama.dora-r8");
    let other = adapter_path("qwen3.attn-r8");
    let nemo = dir.path().join("out.nemo");
    for (input, output, flags, exit, words) in [
        (&broken, &out, &["--to", "peft"][..], Exit::Refused, "LOHA"),
        (&absent, &out, &["--to", "peft"], Exit::Usage, "absent"),
        (&other, &out, &["--to", "peft", "--model", &llama], Exit::Refused, "shape-mismatch"),
        (&dora, &nemo, &["--to", "nemo", "--model", &llama], Exit::Refused, "DoRA"),
        (&dora, &out, &["--to", "nemo", "--model", &llama], Exit::Refused, ".nemo"),
        (&dora, &broken, &["--to", "peft"], Exit::Usage, "exists already"),
        (&dora, &out, &["--to", "loha"], Exit::Usage, "per-expert"),
        (&dora, &out, &["--to", "peft", "--moe-layout", "x"], Exit::Usage, "shared-outer"),
    ] {
        let outcome = convert(input, output, flags);
        assert_eq!(outcome.exit, exit, "{}", outcome.stderr);
        assert!(outcome.stderr.contains(words), "{words}: {}", outcome.stderr);
        assert_eq!(outcome.stdout, "");
    }
    assert!(!out.exists() && !nemo.exists());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn differences_are_reported_by_site_and_in_json() {
    let dir = tempfile::tempdir().unwrap();
    let source = adapter_path("llama.attn-r8");
    let other =
        Copy::new(dir.path(), "other").with_tensors("layers.1.self_attn.v_proj", |tensor| {
            tensor.bytes[1] ^= 0x80;
        });
    let outcome = diff(&source, &other.path(), &[]);
    assert_eq!((outcome.exit, outcome.stderr.as_str()), (Exit::Refused, ""));
    assert!(outcome.stdout.starts_with("layer 1 attn_v"), "{}", outcome.stdout);
    assert!(outcome.stdout.contains("1 of 6 updates differ (tolerance 1e-6)"));
    let report = diff(&source, &other.path(), &["--json"]).stdout;
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["same"], json!(false));
    let updates = report["updates"].as_array().unwrap();
    let differing: Vec<_> = updates.iter().filter(|update| update["same"] == false).collect();
    assert_eq!((updates.len(), differing.len()), (6, 1));
    assert!(differing[0]["difference"].as_f64().unwrap() > 0.0);
    assert_eq!(diff(&source, &other.path(), &["--tolerance", "2"]).exit, Exit::Fine);
    let absent = diff(&source, &dir.path().join("absent"), &[]);
    assert_eq!(absent.exit, Exit::Usage);
    assert!(absent.stderr.contains("absent"));
}

#[test]
fn routed_experts_are_described_with_their_number_and_layout() {
    let path = adapter_path("qwen3-moe.experts-r4");
    let outcome = loramux(&["inspect", path.to_str().unwrap()], b"");
    assert_eq!(outcome.exit, Exit::Fine, "{}", outcome.stdout);
    let words: Vec<Vec<&str>> =
        outcome.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    let row = ["moe_gate", "layers", "0-2", "rank", "4", "scale", "2", "16", "experts"];
    assert!(words.contains(&row.to_vec()), "{}", outcome.stdout);
    assert!(outcome.stdout.contains("layout      routed experts target-parameters"));
    let outcome = loramux(&["inspect", path.to_str().unwrap(), "--json"], b"");
    let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let modules = report["modules"].as_array().unwrap();
    let gate = modules.iter().find(|module| module["module"] == "moe_gate").unwrap();
    assert_eq!(gate["experts"], json!(16));
}
