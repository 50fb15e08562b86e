//! `cargo xtask test-gpu`: the tests of the CUDA backend, here or on another machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::kernels;

/// Arguments of `cargo xtask test-gpu`.
#[derive(clap::Args)]
pub struct Args {
    /// Write a folder that runs the tests on a machine without a toolchain, and run nothing
    #[arg(long, value_name = "DIR")]
    pack: Option<PathBuf>,
}

/// Runs the tests of a packed folder.
const RUNNER: &str = r#"#!/usr/bin/env bash
# Runs the programs that are packed in this folder: `run cuda ARGUMENTS` the tests of the CUDA backend,
# `run xtask bench-gpu` the benchmark.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export POLYLORA_KERNELS="$here/kernels" POLYLORA_FIXTURES="$here/fixtures"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$here/$1" "${@:2}"
"#;

/// Compiles the kernels, then runs or packs the tests.
///
/// # Errors
/// If something does not compile, cannot be written, or fails.
pub fn run(args: &Args) -> Result<()> {
    match &args.pack {
        Some(folder) => pack(folder),
        None => {
            let folder = kernels::default_folder();
            kernels::compile(&folder)?;
            let mut cargo = cargo();
            let status = cargo.env(lora_cuda::kernels::FOLDER_VARIABLE, &folder).status()?;
            ensure!(status.success(), "the tests failed");
            Ok(())
        }
    }
}

fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    cargo.args(["test", "--release", "-p", "polylora-tests", "--test", "cuda"]);
    cargo
}

fn pack(folder: &Path) -> Result<()> {
    kernels::compile(&folder.join("kernels"))?;
    let program = folder.join("cuda");
    stripped(&build()?, &program)?;
    stripped(&std::env::current_exe()?, &folder.join("xtask"))?;
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    copy_folder(&fixtures, &folder.join("fixtures"))?;
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/models");
    copy_folder(&models, &folder.join("models"))?;
    let runner = folder.join("run");
    fs::write(&runner, RUNNER)?;
    fs::set_permissions(&runner, fs::metadata(&program)?.permissions())?;
    println!("run {} on a machine with a GPU", runner.display());
    Ok(())
}

/// Copies a program without the symbols of debuggers, which make up most of it.
fn stripped(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("strip").arg("-o").arg(to).arg(from).status();
    ensure!(status.context("cannot run strip")?.success(), "strip failed");
    Ok(())
}

/// Builds the test program and returns its path.
fn build() -> Result<PathBuf> {
    let mut cargo = cargo();
    cargo.args(["--no-run", "--message-format=json-render-diagnostics"]);
    let output = cargo.stderr(std::process::Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the tests do not compile");
    let lines = output.stdout.split(|byte| *byte == b'\n');
    let messages = lines.filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok());
    let program = |message: serde_json::Value| {
        let ours = message["target"]["name"] == "cuda";
        ours.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    };
    match messages.filter_map(program).next_back() {
        Some(path) => Ok(path),
        None => bail!("cargo named no test program"),
    }
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy_folder(&entry.path(), &target)?,
            false => drop(fs::copy(entry.path(), target)?),
        }
    }
    Ok(())
}
