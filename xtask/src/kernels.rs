//! `cargo xtask kernels`: from the sources of `lora-cuda` to a folder that it loads.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use lora_cuda::kernels::{HEADERS, MANIFEST, Manifest, NVCC_FLAGS, UNITS, compiled_name, version};
use rayon::prelude::*;

use crate::nvcc::Nvcc;

/// Arguments of `cargo xtask kernels`.
#[derive(clap::Args)]
pub struct Args {
    /// Architecture; the kernels use instructions of this one alone
    #[arg(long, default_value = "90a")]
    arch: String,
    /// Folder to write to
    #[arg(long, default_value_os_t = default_folder())]
    out: PathBuf,
}

/// `target/kernels` of the checkout, where programs that are run there look.
pub fn default_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kernels")
}

/// Compiles the kernels, unless the folder holds those of this version.
///
/// # Errors
/// If there is no compiler, or it refuses a file.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.arch == "90a", "--arch is {}; allowed: 90a, as of an H100 or H200", args.arch);
    compile(&args.out)
}

/// As [`run`], into `folder`.
pub fn compile(folder: &Path) -> Result<()> {
    let manifest = folder.join(MANIFEST);
    let known = fs::read(&manifest).ok().and_then(|t| serde_json::from_slice::<Manifest>(&t).ok());
    if known.is_some_and(|known| known.version == version()) {
        println!("{} holds the kernels of version {}", folder.display(), version());
        return Ok(());
    }
    let nvcc = Nvcc::find()?;
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    // Sources are taken from the program, so that what is compiled is what its version names.
    let sources = tempfile::tempdir()?;
    for source in HEADERS.iter().chain(&UNITS) {
        fs::write(sources.path().join(source.name), source.text)?;
    }
    UNITS.par_iter().try_for_each(|unit| {
        let target = folder.join(compiled_name(unit));
        nvcc.compile(&NVCC_FLAGS, &sources.path().join(unit.name), &target)
    })?;
    let written = Manifest { version: version(), compiler: nvcc.version()? };
    fs::write(&manifest, serde_json::to_string_pretty(&written)?)?;
    println!("{} kernel files of version {} in {}", UNITS.len(), version(), folder.display());
    Ok(())
}
