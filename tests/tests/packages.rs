//! Packages for crates.io: all can be created, and one is built from its package alone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

/// Runs `cargo package` offline, in a separate target folder.
fn package(arguments: &[&str]) -> String {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(&workspace).args(["package", "--offline", "--allow-dirty"]).args(arguments);
    cargo.args(["--target-dir", "target/packaged"]).env("CARGO_PROFILE_DEV_DEBUG", "none");
    let output = cargo.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "cargo package {arguments:?}: {stderr}");
    stderr
}

#[test]
fn every_crate_can_be_packaged_and_one_is_built_from_its_package() {
    let stderr = package(&["--workspace", "--no-verify"]);
    let crates =
        ["lora-core", "lora-cpu-ref", "lora-cuda", "loramux-moe", "loramux-engine", "loramux"];
    for name in crates {
        assert!(stderr.contains(&format!("Packaging {name} v")), "{name}: {stderr}");
    }
    let stderr = package(&["-p", "lora-core"]);
    assert!(stderr.contains("packaged/package/lora-core-"), "{stderr}");
}
