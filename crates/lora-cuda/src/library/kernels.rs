//! Sources of the kernels, their version, and where compiled ones are found.
//!
//! The sources are part of this crate, so a program knows which kernels it needs, and refuses those
//! of any other version.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use super::requirements::{CAPABILITY, FOLDER_VARIABLE};
use crate::error::CudaError;

/// File that describes a folder of compiled kernels.
pub const MANIFEST: &str = "manifest.json";

/// Flags of `nvcc` for a unit. `90a` has the instructions that only Hopper has, as `wgmma`.
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
    /// Its text.
    pub text: &'static str,
}

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        [$(Source { name: $name, text: include_str!(concat!("../../kernels/", $name)) }),*]
    };
}

/// Headers, which are not compiled by themselves.
pub const HEADERS: [Source; 13] = sources![
    "attention.cuh",
    "cluster.cuh",
    "common.cuh",
    "float_order.cuh",
    "linear_stream.cuh",
    "linear_stream_epilogue.cuh",
    "linear_tiles.cuh",
    "linear_tiles_loader.cuh",
    "lora.cuh",
    "lora_factors.cuh",
    "mma.cuh",
    "tma.cuh",
    "wgmma.cuh",
];

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

/// Files that become [`LIBRARY`]; those that end in `.cu` are compiled.
pub const LIBRARY_SOURCES: [Source; 5] = sources![
    "flashinfer/library.h",
    "flashinfer/prefill.cuh",
    "flashinfer/library.cu",
    "flashinfer/prefill_64.cu",
    "flashinfer/prefill_128.cu",
];

/// The shared object of the kernels that are made of CUTLASS and FlashInfer.
pub const LIBRARY: &str = "libloramux_flashinfer.so";

/// The package on PyPI whose headers the library is compiled with: FlashInfer's, and the CUTLASS and CCCL that
/// it was written for.
pub const LIBRARY_HEADERS: &str = "flashinfer-python==0.7.2.post1";

/// Flags of `nvcc` for a file of the library, besides the folders of headers.
pub const LIBRARY_FLAGS: [&str; 7] = [
    "-c",
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--expt-relaxed-constexpr",
    "-DNDEBUG",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
];

/// Flags of `nvcc` to link the library, so that it needs nothing but the C library.
pub const LINK_FLAGS: [&str; 3] =
    ["-shared", "-cudart=static", "-Xcompiler=-static-libstdc++,-static-libgcc"];

/// The description of a folder of compiled kernels.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// [`version`] of the sources.
    pub version: String,
    /// [`library_version`] of those of the library.
    #[serde(default)]
    pub flashinfer: String,
    /// What the compiler prints as its version.
    pub compiler: String,
}

/// The version of the kernels: a hash of all sources and flags.
pub fn version() -> String {
    let sources = HEADERS.iter().chain(&UNITS).flat_map(|source| [source.name, source.text]);
    hash_of(sources.chain(NVCC_FLAGS).chain([library_version().as_str()]))
}

/// The version of the library alone, which is not compiled again while it stays the same: that takes longer than
/// all else.
pub fn library_version() -> String {
    let sources = LIBRARY_SOURCES.iter().flat_map(|source| [source.name, source.text]);
    hash_of(sources.chain(LIBRARY_FLAGS).chain(LINK_FLAGS).chain([LIBRARY_HEADERS]))
}

fn hash_of<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    let mut hash = blake3::Hasher::new();
    for text in texts {
        hash.update(&(text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
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
        let files_of = |folder: &str| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels").join(folder);
            let entries = std::fs::read_dir(path).unwrap().map(Result::unwrap);
            let files = entries.filter(|entry| entry.path().is_file());
            let name = |entry: std::fs::DirEntry| entry.file_name().into_string().unwrap();
            files.map(name).map(|name| format!("{folder}{name}")).collect::<Vec<_>>()
        };
        let mut found = [files_of(""), files_of("flashinfer/")].concat();
        found.sort_unstable();
        let all = HEADERS.iter().chain(&UNITS).chain(&LIBRARY_SOURCES);
        let mut listed: Vec<&str> = all.map(|source| source.name).collect();
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
