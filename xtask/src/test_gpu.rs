//! `cargo xtask test-gpu`: runs the tests of the CUDA backend here, or packs them for another machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{folder, kernels, model_pack, parity};

/// Arguments of `cargo xtask test-gpu`.
#[derive(clap::Args)]
pub struct Args {
    /// Do not run the tests; write a folder that runs them on a machine without a toolchain
    #[arg(long, value_name = "DIR")]
    pack: Option<PathBuf>,
    /// Do not run the tests; write the demo's adapters and its model, cut into pieces that are small enough to
    /// copy to another machine, with a script that joins them
    #[arg(long, value_name = "DIR")]
    pack_model: Option<PathBuf>,
    /// Number of pieces of the model
    #[arg(long, value_name = "N", default_value_t = 2, requires = "pack_model")]
    parts: usize,
    /// Write device, driver, test counts and the largest error of each op to this JSON file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["pack", "pack_model"])]
    report: Option<PathBuf>,
    /// Run this packed test program instead of compiling one
    #[arg(long, value_name = "FILE", conflicts_with_all = ["pack", "pack_model"])]
    program: Option<PathBuf>,
}

/// The test program.
const TESTS: &str = "cuda";

/// The `loramux` program.
const PROGRAM: &str = "loramux";

/// Maximum size of a packed folder, in bytes.
const MAX_PACKED: u64 = 60 << 20;

/// Script that runs the programs of a packed folder.
const RUNNER: &str = r#"#!/usr/bin/env bash
# Runs the programs packed in this folder:
#   run parity FILE          all tests of the CUDA backend, with a JSON report
#   run cuda ARGUMENTS       some of the tests
#   run cuda --ignored       the tests that fill the device's memory
#   run xtask bench-gpu      the benchmarks
#   run loramux ARGUMENTS    the program itself
# LORAMUX_DEMO_MODEL is the folder that `--pack-model` wrote, after its `join` was run; without it the demo's tests
# are skipped. LORAMUX_FIXTURES overrides the folder of the fixtures.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export LORAMUX_KERNELS="$here/kernels" LORAMUX_FIXTURES="${LORAMUX_FIXTURES:-$here/fixtures}"
shopt -s nullglob
for program in "$here"/*.gz; do
    [ -e "${program%.gz}" ] || gunzip --keep "$program"
done
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >&2
if [ "$1" = parity ]; then
    exec "$here/xtask" test-gpu --program "$here/cuda" --report "${2:-gpu-parity.json}"
fi
"$here/$1" "${@:2}"
"#;

/// Compiles the kernels, then runs or packs the tests.
///
/// # Errors
/// If something does not compile, cannot be written, or fails.
pub fn run(args: &Args) -> Result<()> {
    if let Some(folder) = &args.pack_model {
        model_pack::write(folder, args.parts)?;
    }
    if let Some(folder) = &args.pack {
        pack(folder)?;
    }
    if args.pack.is_some() || args.pack_model.is_some() {
        return Ok(());
    }
    let runs = runs(args.program.as_deref())?;
    match &args.report {
        Some(report) => parity::run(runs, report),
        None => {
            let mut passed = true;
            for mut tests in runs {
                passed &= tests.status()?.success();
            }
            ensure!(passed, "the tests failed");
            Ok(())
        }
    }
}

/// Two runs: most tests, and then those that fill the device, which would leave no memory for tests beside them.
fn runs(program: Option<&Path>) -> Result<[Command; 2]> {
    let Some(program) = program else {
        let folder = kernels::default_folder();
        kernels::compile(&folder)?;
        return Ok([&[][..], &["--", "--ignored"]].map(|arguments| {
            let mut cargo = cargo("test");
            cargo.env(lora_cuda::kernels::FOLDER_VARIABLE, &folder);
            cargo.args(["--test", TESTS]).args(arguments);
            cargo
        }));
    };
    let (tests, mut alone) = (Command::new(program), Command::new(program));
    alone.arg("--ignored");
    Ok([tests, alone])
}

fn cargo(command: &str) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    cargo.args([command, "--release", "-p", "loramux-tests"]);
    cargo
}

fn pack(folder: &Path) -> Result<()> {
    kernels::compile(&folder.join("kernels"))?;
    for (name, program) in [TESTS, PROGRAM].into_iter().zip(build()?) {
        compressed(&program, &folder.join(name))?;
    }
    let own = std::env::current_exe()?;
    compressed(&own, &folder.join("xtask"))?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (from, to) in [("tests/fixtures", "fixtures"), ("bench/models", "models")] {
        folder::copy(&sources.join(from), &folder.join(to))?;
    }
    let runner = folder.join("run");
    fs::write(&runner, RUNNER)?;
    fs::set_permissions(&runner, fs::metadata(&own)?.permissions())?;
    let bytes = folder::size(folder)?;
    ensure!(bytes <= MAX_PACKED, "{} has {bytes} bytes; allowed: 60 MiB", folder.display());
    println!("run {} on a machine with a GPU ({} MiB)", runner.display(), bytes >> 20);
    Ok(())
}

/// Writes a program as `to.gz`, without debug symbols, which make up most of its size.
fn compressed(from: &Path, to: &Path) -> Result<()> {
    let finish = |mut command: Command, name: &str| {
        let status = command.status().with_context(|| format!("cannot run {name}"))?;
        ensure!(status.success(), "{name} failed");
        Ok(())
    };
    let mut strip = Command::new("strip");
    strip.arg("-o").arg(to).arg(from);
    finish(strip, "strip")?;
    let mut gzip = Command::new("gzip");
    gzip.args(["--best", "--force"]).arg(to);
    finish(gzip, "gzip")
}

/// Builds the test program and `loramux`, and returns their paths. One call builds both, because cargo would otherwise
/// unify features for each package alone and build dependencies twice.
fn build() -> Result<[PathBuf; 2]> {
    let mut cargo = cargo("build");
    cargo.args(["-p", "loramux", "--test", TESTS, "--bin", PROGRAM]);
    cargo.arg("--message-format=json-render-diagnostics");
    let output = cargo.stderr(std::process::Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the programs do not compile");
    let lines = output.stdout.split(|byte| *byte == b'\n');
    let messages: Vec<Value> = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
    Ok([executable(&messages, TESTS)?, executable(&messages, PROGRAM)?])
}

/// Finds the path of a target in cargo's messages.
fn executable(messages: &[Value], target: &str) -> Result<PathBuf> {
    let of_target = messages.iter().filter(|message| message["target"]["name"] == target);
    let path = of_target.filter_map(|message| message["executable"].as_str()).next_back();
    path.map(PathBuf::from).with_context(|| format!("cargo named no program {target}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_program_is_found_among_the_messages_of_cargo() {
        let message = |name: &str, path: Option<&str>| json!({"reason": "compiler-artifact", "target": {"name": name}, "executable": path});
        let finished = json!({"reason": "build-finished", "success": true});
        let messages = [
            message("cuda", None),
            message("cuda", Some("a/cuda-1")),
            message("b", Some("b")),
            finished,
        ];
        assert_eq!(executable(&messages, "cuda").unwrap(), Path::new("a/cuda-1"));
        let error = executable(&messages, "loramux").unwrap_err().to_string();
        assert!(error.contains("loramux"), "{error}");
    }

    #[test]
    fn a_packed_program_runs_twice() {
        let [tests, alone] = runs(Some(Path::new("cuda"))).unwrap();
        assert_eq!((tests.get_args().count(), alone.get_args().count()), (0, 1));
    }
}
