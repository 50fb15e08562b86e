//! `cargo xtask kernels`: compiles the kernels of `lora-cuda` into the folder that it loads them from.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use lora_cuda::kernels::{
    HEADERS, LIBRARY, LIBRARY_FLAGS, LIBRARY_SOURCES, LINK_FLAGS, MANIFEST, Manifest, NVCC_FLAGS,
    Source, UNITS, compiled_name, library_version, version,
};
use rayon::prelude::*;
use tempfile::TempDir;

use crate::nvcc::{Nvcc, library_headers};

/// Arguments of `cargo xtask kernels`.
#[derive(clap::Args)]
pub struct Args {
    /// GPU architecture; the kernels use instructions that only 90a has
    #[arg(long, default_value = "90a")]
    arch: String,
    /// Folder to write to
    #[arg(long, default_value_os_t = default_folder())]
    out: PathBuf,
}

/// `target/kernels` of the checkout, where programs run from it look for kernels.
pub fn default_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kernels")
}

/// Compiles the kernels, unless the folder already has this version.
///
/// # Errors
/// If no compiler can be found or installed, or a file does not compile.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.arch == "90a", "--arch is {}; allowed: 90a, as of an H100 or H200", args.arch);
    compile(&args.out)
}

/// As [`run`], into `folder`.
pub fn compile(folder: &Path) -> Result<()> {
    let manifest = folder.join(MANIFEST);
    let known = fs::read(&manifest).ok().and_then(|t| serde_json::from_slice::<Manifest>(&t).ok());
    if known.as_ref().is_some_and(|known| known.version == version()) {
        println!("{} holds the kernels of version {}", folder.display(), version());
        return Ok(());
    }
    let nvcc = Nvcc::find()?;
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let sources = Sources::written()?;
    if known.is_none_or(|known| known.flashinfer != library_version()) {
        sources.compile_library(&nvcc, &folder.join(LIBRARY))?;
    }
    UNITS.par_iter().try_for_each(|unit| {
        let target = folder.join(compiled_name(unit));
        nvcc.run(&NVCC_FLAGS, &[sources.path(unit)], &target)
    })?;
    let (version, flashinfer) = (version(), library_version());
    let written = Manifest { version, flashinfer, compiler: nvcc.version()? };
    fs::write(&manifest, serde_json::to_string_pretty(&written)?)?;
    let (count, version) = (UNITS.len(), written.version);
    println!("{count} kernel files and {LIBRARY} of version {version} in {}", folder.display());
    Ok(())
}

/// The sources, written to a temporary folder. They come from this program and not from the checkout, so that they match
/// the version that the program expects.
struct Sources(TempDir);

impl Sources {
    fn written() -> Result<Self> {
        let written = Self(tempfile::tempdir()?);
        for source in HEADERS.iter().chain(&UNITS).chain(&LIBRARY_SOURCES) {
            let path = written.path(source);
            fs::create_dir_all(path.parent().context("a file without a folder")?)?;
            fs::write(path, source.text)?;
        }
        Ok(written)
    }

    fn path(&self, source: &Source) -> PathBuf {
        self.0.path().join(source.name)
    }

    fn compile_library(&self, nvcc: &Nvcc, target: &Path) -> Result<()> {
        let headers: Vec<String> = library_headers()?
            .iter()
            .map(|folder| format!("-isystem={}", folder.display()))
            .collect();
        let flags: Vec<&str> =
            LIBRARY_FLAGS.into_iter().chain(headers.iter().map(String::as_str)).collect();
        println!("compiling {LIBRARY}, which takes some minutes");
        let units = LIBRARY_SOURCES.par_iter().filter(|source| source.name.ends_with(".cu"));
        let objects = units.map(|unit| {
            let object = self.path(unit).with_extension("o");
            nvcc.run(&flags, &[self.path(unit)], &object).map(|()| object)
        });
        let objects = objects.collect::<Result<Vec<_>>>()?;
        let libraries = nvcc.libraries().map(|folder| format!("-L{}", folder.display()));
        let flags: Vec<&str> = LINK_FLAGS.into_iter().chain(libraries.as_deref()).collect();
        nvcc.run(&flags, &objects, target)
    }
}
