//! Sources of the kernels, their version, and where compiled ones are found.
//!
//! The sources are part of this crate, so a program knows which kernels it needs, and refuses those
//! of any other version.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::CudaError;

/// The environment variable that names the folder of compiled kernels.
pub const FOLDER_VARIABLE: &str = "POLYLORA_KERNELS";

/// Compute capability that kernels are compiled for.
pub const CAPABILITY: &str = "9.0";

/// File that describes a folder of compiled kernels.
pub const MANIFEST: &str = "manifest.json";

/// What `nvcc` is called with, beside input and output. `90a` has instructions of Hopper alone.
pub const NVCC_FLAGS: [&str; 5] = [
    "--fatbin",
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Werror=all-warnings",
];

/// A source file.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Name of the file.
    pub name: &'static str,
    /// What it holds.
    pub text: &'static str,
}

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        [$(Source { name: $name, text: include_str!(concat!("../kernels/", $name)) }),*]
    };
}

/// Headers, which are not compiled by themselves.
pub const HEADERS: [Source; 5] =
    sources!["attention.cuh", "common.cuh", "hopper.cuh", "lora.cuh", "lora_factors.cuh"];

/// Files that become a fatbin each.
pub const UNITS: [Source; 14] = sources![
    "attention.cu",
    "attention_decode.cu",
    "attention_prefill.cu",
    "linear.cu",
    "linear_stream.cu",
    "linear_tiles.cu",
    "logprobs.cu",
    "lora.cu",
    "lora_mma.cu",
    "lora_shrink.cu",
    "norm.cu",
    "rope.cu",
    "rows.cu",
    "sample.cu",
];

/// What a folder of compiled kernels says of itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// [`version`] of the sources.
    pub version: String,
    /// The compiler's own words about its version.
    pub compiler: String,
}

/// The version of the kernels: a hash of sources and flags.
pub fn version() -> String {
    let mut hash = blake3::Hasher::new();
    for source in HEADERS.iter().chain(&UNITS) {
        for text in [source.name, source.text] {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        }
    }
    for flag in NVCC_FLAGS {
        hash.update(flag.as_bytes());
    }
    hash.finalize().to_hex()[..16].to_owned()
}

/// Name of a unit's compiled file.
pub fn compiled_name(unit: &Source) -> String {
    format!("{}.fatbin", unit.name.trim_end_matches(".cu"))
}

/// The folder of compiled kernels: that of [`FOLDER_VARIABLE`] if it is set, else `kernels` beside
/// the program, else `target/kernels` under the working directory.
///
/// # Errors
/// [`CudaError::NoKernels`], [`CudaError::KernelFile`] or [`CudaError::KernelVersion`].
pub fn find() -> Result<PathBuf, CudaError> {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("kernels")));
    let candidates = match std::env::var_os(FOLDER_VARIABLE) {
        Some(folder) => vec![PathBuf::from(folder)],
        None => beside.into_iter().chain([PathBuf::from("target/kernels")]).collect(),
    };
    find_in(candidates)
}

fn find_in(candidates: Vec<PathBuf>) -> Result<PathBuf, CudaError> {
    match candidates.iter().find(|folder| folder.join(MANIFEST).is_file()) {
        Some(folder) => check(folder).map(|()| folder.clone()),
        None => Err(CudaError::NoKernels { searched: candidates }),
    }
}

/// Checks that a folder holds the kernels of this version.
fn check(folder: &Path) -> Result<(), CudaError> {
    let path = folder.join(MANIFEST);
    let broken = |cause: String| CudaError::KernelFile { path: path.clone(), cause };
    let text = std::fs::read(&path).map_err(|e| broken(e.to_string()))?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| broken(e.to_string()))?;
    let wanted = version();
    if manifest.version == wanted {
        return Ok(());
    }
    Err(CudaError::KernelVersion { folder: folder.to_owned(), found: manifest.version, wanted })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_in_the_folder_is_listed() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let mut found: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort_unstable();
        let mut listed: Vec<&str> = HEADERS.iter().chain(&UNITS).map(|s| s.name).collect();
        listed.sort_unstable();
        assert_eq!(found, listed);
    }

    #[test]
    fn kernels_that_are_absent_old_or_broken_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let find = || find_in(vec![dir.path().join("nowhere"), dir.path().to_owned()]);
        assert!(find().unwrap_err().to_string().contains("cargo xtask kernels"));
        let write = |text: &str| std::fs::write(dir.path().join(MANIFEST), text).unwrap();
        write("{");
        assert!(matches!(find().unwrap_err(), CudaError::KernelFile { .. }));
        write(r#"{"version": "0123", "compiler": "nvcc"}"#);
        let error = find().unwrap_err().to_string();
        assert!(error.contains("0123") && error.contains(&version()), "{error}");
        write(&format!(r#"{{"version": "{}", "compiler": "nvcc"}}"#, version()));
        assert_eq!(find().unwrap(), dir.path());
    }
}
