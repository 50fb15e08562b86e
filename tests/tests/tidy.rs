//! The habits of the workspace, as far as a program can check them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};
use loramux_tests::{sources, workspace};
use regex::Regex;
use spdx::{Expression, LicenseItem, ParseMode};

/// The most lines of a source file: what does not fit holds more than one concept.
const MAX_LINES: usize = 500;

/// What each crate may use of the workspace.
const LAYERS: [(&str, &[&str]); 6] = [
    ("lora-core", &[]),
    ("loramux-moe", &["lora-core"]),
    ("lora-cpu-ref", &["lora-core", "loramux-moe"]),
    ("lora-cuda", &["lora-core", "loramux-moe"]),
    ("loramux-engine", &["lora-core", "loramux-moe"]),
    ("loramux", &["lora-core", "loramux-moe", "lora-cpu-ref", "lora-cuda", "loramux-engine"]),
];

/// What crates that describe adapters and devices leave to those above them.
const FOR_UPPER_LAYERS: [&str; 4] = ["axum", "cudarc", "tokenizers", "tokio"];

/// The most packages that `lora-core` builds with its default features, itself included.
const MAX_CORE_TREE: usize = 60;

/// Licences that code under Apache-2.0 may be linked with.
const LICENCES: [&str; 15] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Names that were given up for the field's own, and what is written in their place.
const RETIRED: [(&str, &str); 23] = [
    (r"(?i)polylora", "loramux"),
    (r"\bhead_norms\b", "qk_norms"),
    (r"\bsettle_targets\b", "resolve_targets"),
    (r"(?i)\bfinisher", "epilogue warps"),
    (r"(?i)\bfiller", "LoRA loader warps"),
    (r"\btell_inputs\b", "signal_ready"),
    (r"\bwait_to_be_told\b", "wait_ready"),
    (r"\blet_next_start\b", "pdl_launch_dependents"),
    (r"\bwait_for_inputs\b", "pdl_wait"),
    (r"\bPorter\b", "KvLoader"),
    (r"\bstruct Bridge\b", "ZTile"),
    (r"\bfade\(", "rescale"),
    (r"\bweigh\(", "online_softmax"),
    (r"\b(coarse|fine)_(sum|part)", "hi, lo"),
    (r"\bproducts_(begin|commit|wait)", "wgmma_fence, wgmma_commit, wgmma_wait"),
    (r"\b(FIRST|LAST)_OUT\b", "EVICT_FIRST, EVICT_LAST"),
    (r"\b(MOST|LEAST)\b|\b(MOST|LEAST)_[A-Z]", "MAX_, MIN_"),
    (r"\bgeo: (Mat|MatLayout)\b", "layout: MatLayout"),
    (r"\bdraws_unseen\b", "can_overlap"),
    (r"\bpublish_tail\b", "insert_partial"),
    (r"\bstruct Growing\b", "OutputBuilder"),
    (r"(?i)\bthe second cache\b|\bcopy engine\b", "L2, TMA"),
    (r"\bthe original('s)? (behaviou?r|engine|does|code|takes|refuses)\b", "TensorRT-LLM"),
];

/// The platform of this machine, as `rustc` names it.
fn host() -> String {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let output = std::process::Command::new(rustc).arg("-vV").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("host: "));
    line.expect("rustc names its host").to_owned()
}

fn metadata() -> Metadata {
    let mut command = MetadataCommand::new();
    command.manifest_path(workspace().join("Cargo.toml"));
    // Packages of other platforms may not have been downloaded.
    let options = ["--locked", "--offline", "--filter-platform", &host()];
    command.other_options(options.map(str::to_owned).to_vec());
    command.exec().unwrap()
}

/// Every source file of the project, and its text.
fn texts(ends: &[&str]) -> Vec<(String, String)> {
    let root = workspace();
    let folders = ["crates", "tests", "xtask", "fuzz", "docs"].map(|name| root.join(name));
    let at_root = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path());
    let at_root =
        at_root.filter(|path| ends.iter().any(|end| path.to_string_lossy().ends_with(end)));
    let paths = folders.iter().flat_map(|folder| sources(folder, ends)).chain(at_root);
    let shown = |path: &Path| path.strip_prefix(&root).unwrap().display().to_string();
    paths.map(|path| (shown(&path), fs::read_to_string(&path).unwrap())).collect()
}

#[test]
fn crates_use_only_those_below_them() {
    let metadata = metadata();
    let layers: BTreeMap<&str, &[&str]> = LAYERS.into_iter().collect();
    for package in metadata.workspace_packages() {
        let Some(below) = layers.get(package.name.as_str()) else {
            let is_for_developers = package.publish.as_ref().is_some_and(Vec::is_empty);
            assert!(is_for_developers, "{} has no place among the layers", package.name);
            continue;
        };
        for dependency in package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal) {
            let (user, used) = (&package.name, dependency.name.as_str());
            if dependency.path.is_some() {
                assert!(below.contains(&used), "{user} may not use {used}");
            }
            let is_lower = ["lora-core", "loramux-moe"].contains(&user.as_str());
            assert!(!is_lower || !FOR_UPPER_LAYERS.contains(&used), "{user} may not use {used}");
        }
    }
}

#[test]
fn lora_core_stays_small() {
    let tree = std::process::Command::new(env!("CARGO"))
        .args(["tree", "--package", "lora-core", "--edges", "normal", "--prefix", "none"])
        .args(["--format", "{p}", "--locked", "--offline"])
        .current_dir(workspace())
        .output()
        .unwrap();
    let text = String::from_utf8(tree.stdout).unwrap();
    let packages: BTreeSet<&str> = text.lines().filter_map(|l| l.split(" (").next()).collect();
    let count = packages.len();
    assert!((10..MAX_CORE_TREE).contains(&count), "{count} packages: {packages:?}");
}

#[test]
fn every_dependency_has_a_licence_that_goes_with_ours() {
    let allowed = LICENCES.map(|name| Expression::parse(name).unwrap());
    let is_allowed = |required: &spdx::LicenseReq| {
        let mut of_list = allowed.iter().flat_map(Expression::requirements);
        of_list.any(|listed| listed.req == *required)
    };
    let metadata = metadata();
    for package in metadata.packages.iter().filter(|package| package.source.is_some()) {
        let name = &package.name;
        let text = package.license.as_ref().unwrap_or_else(|| panic!("{name} has no licence"));
        let licence = Expression::parse_mode(text, ParseMode::LAX).unwrap();
        assert!(licence.evaluate(is_allowed), "{name}: {text}");
        let is_named =
            |r: &spdx::expression::ExpressionReq| matches!(r.req.license, LicenseItem::Spdx { .. });
        assert!(licence.requirements().all(is_named), "{name}: {text}");
    }
}

#[test]
fn every_op_is_in_the_suite_of_backends() {
    let root = workspace();
    let backend = fs::read_to_string(root.join("crates/lora-core/src/device/backend.rs")).unwrap();
    let methods = Regex::new(r"(?m)^    fn ([a-z0-9_]+)").unwrap();
    let of_trait = backend.split("pub trait Backend").nth(1).unwrap();
    let suite: String = sources(&root.join("tests/src"), &[".rs"])
        .iter()
        .chain(&sources(&root.join("tests/tests"), &[".rs"]))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let mut count = 0;
    for method in methods.captures_iter(of_trait) {
        assert!(suite.contains(&format!(".{}(", &method[1])), "no test calls {}", &method[1]);
        count += 1;
    }
    assert!(count > 20, "{count} methods");
}

#[test]
fn files_are_short() {
    let long: Vec<String> = texts(&[".rs", ".cu", ".cuh", ".h"])
        .into_iter()
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > MAX_LINES)
        .map(|(path, lines)| format!("{path} has {lines} lines"))
        .collect();
    assert!(long.is_empty(), "more than {MAX_LINES} lines; divide by concept: {long:#?}");
}

#[test]
fn retired_words_stay_retired() {
    let retired = RETIRED.map(|(word, instead)| (Regex::new(word).unwrap(), instead));
    let mut found = Vec::new();
    for (path, text) in texts(&[".rs", ".cu", ".cuh", ".h", ".md", ".toml"]) {
        // The changelog is history.
        if path.ends_with("tests/tidy.rs") || path == "CHANGELOG.md" {
            continue;
        }
        for (number, line) in (1..).zip(text.lines()) {
            let mut hits = retired.iter().filter(|(word, _)| word.is_match(line));
            found.extend(
                hits.next().map(|(_, instead)| format!("{path}:{number}: write {instead}")),
            );
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}
