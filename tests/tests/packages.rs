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
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "cargo package {arguments:?}: {told}");
    told
}

#[test]
fn every_crate_can_be_packaged_and_one_is_built_from_its_package() {
    let told = package(&["--workspace", "--no-verify"]);
    let crates =
        ["lora-core", "lora-cpu-ref", "lora-cuda", "loramux-moe", "loramux-engine", "loramux"];
    for name in crates {
        assert!(told.contains(&format!("Packaging {name} v")), "{name}: {told}");
    }
    let told = package(&["-p", "lora-core"]);
    assert!(told.contains("packaged/package/lora-core-"), "{told}");
}
