//! `cargo xtask format-kernels`: formats the CUDA sources with a pinned clang-format.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lora_cuda::kernels::{HEADERS, LIBRARY_SOURCES, UNITS};

use crate::nvcc::{cache_folder, install};

/// The package on PyPI that has the formatter. Releases differ in what they write, so it is pinned.
const PACKAGE: &str = "clang-format==22.1.8";

/// Where the package has the formatter itself; its script in `bin` needs a Python path.
const BINARY: &str = "clang_format/data/bin/clang-format";

/// Arguments of `cargo xtask format-kernels`.
#[derive(clap::Args)]
pub struct Args {
    /// Write nothing, and fail if a file is not formatted
    #[arg(long)]
    check: bool,
}

/// Formats all kernels, or checks that they are.
///
/// # Errors
/// If clang-format cannot be installed or run, and with `--check` if a file is not formatted.
pub fn run(args: &Args) -> Result<()> {
    let clang_format = find()?;
    let mut changed = Vec::new();
    for source in HEADERS.iter().chain(&UNITS).chain(&LIBRARY_SOURCES) {
        let path = folder().join(source.name);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let formatted = format(&clang_format, &path)?;
        if formatted == text {
            continue;
        }
        if !args.check {
            fs::write(&path, formatted).with_context(|| path.display().to_string())?;
        }
        changed.push(source.name);
    }
    ensure!(
        changed.is_empty() || !args.check,
        "not formatted under crates/lora-cuda/kernels: {}; run `cargo xtask format-kernels`",
        changed.join(", ")
    );
    println!("formatted {} kernel files", changed.len());
    Ok(())
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/lora-cuda/kernels")
}

/// The formatter, which is installed in the user's cache directory if need be.
fn find() -> Result<PathBuf> {
    let folder = cache_folder(PACKAGE)?;
    let binary = folder.join(BINARY);
    if !binary.is_file() {
        install(&[PACKAGE], &folder)?;
    }
    Ok(binary)
}

/// The text of a file as `.clang-format` in the checkout's root wants it.
fn format(clang_format: &Path, path: &Path) -> Result<String> {
    let flags = ["--style=file", "--fallback-style=none"];
    let output = Command::new(clang_format).args(flags).arg(path).output();
    let output = output.with_context(|| format!("cannot run {}", clang_format.display()))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {errors}", path.display());
    String::from_utf8(output.stdout).with_context(|| path.display().to_string())
}
