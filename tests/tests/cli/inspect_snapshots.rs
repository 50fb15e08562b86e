//! The output of `loramux inspect` for every fixture and demo adapter, as snapshots.

use std::path::{Path, PathBuf};

use loramux::Exit;
use loramux_tests::adapter_path;

use super::support::loramux;

/// The folders in `parent`, sorted by name.
fn folders(parent: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(parent)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    found.sort();
    assert!(!found.is_empty(), "{} holds no folder", parent.display());
    found
}

fn compare(parent: &Path, prefix: &str, model_of: impl Fn(&str) -> Option<PathBuf>) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../snapshots/inspect");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| {
        for path in folders(parent) {
            let name = path.file_name().unwrap().to_str().unwrap();
            let mut words = vec!["inspect", path.to_str().unwrap()];
            let model = model_of(name);
            if let Some(model) = &model {
                words.extend(["--model", model.to_str().unwrap()]);
            }
            let outcome = loramux(&words, b"");
            assert_eq!((outcome.exit, outcome.stderr.as_str()), (Exit::Fine, ""), "{name}");
            let text = outcome.stdout.replace(parent.to_str().unwrap(), "[adapters]");
            insta::assert_snapshot!(format!("{prefix}{name}"), text);
        }
    });
}

#[test]
fn every_fixture_adapter_is_described() {
    let parent = adapter_path("llama.attn-r8").parent().unwrap().to_owned();
    compare(&parent, "", |name| {
        let model = name.split_once('.').unwrap().0;
        // Models with routed experts are not supported by the program yet.
        let dense = !["mixtral", "qwen3-moe"].contains(&model);
        dense.then(|| loramux_tests::model_path(model))
    });
}

#[test]
fn every_demo_adapter_is_described() {
    compare(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/adapters"), "demo.", |_| None);
}
