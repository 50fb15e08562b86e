//! The CUDA compiler: an installed one, or that of NVIDIA's packages on PyPI.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use lora_cuda::kernels::LIBRARY_HEADERS;

/// PyPI packages that together are a compiler, of the CUDA version that the kernels need.
const PACKAGES: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
];

/// Folder of CUDA inside the packages.
const INSIDE: &str = "nvidia/cu13";

/// A CUDA compiler.
pub struct Nvcc(PathBuf);

impl Nvcc {
    /// Finds `$NVCC`, else `nvcc` on `$PATH`, else that of the packages, which are installed into the user's cache
    /// directory if they are missing.
    ///
    /// # Errors
    /// If `$NVCC` cannot be run, or pip cannot install the packages.
    pub fn find() -> Result<Self> {
        if let Some(named) = std::env::var_os("NVCC") {
            let nvcc = Self(named.into());
            nvcc.version().context("$NVCC")?;
            return Ok(nvcc);
        }
        let on_path = Self("nvcc".into());
        if on_path.version().is_ok() {
            return Ok(on_path);
        }
        let folder = cache_folder("cuda-13.0")?;
        let nvcc = Self(folder.join(INSIDE).join("bin").join("nvcc"));
        if nvcc.version().is_err() {
            install(&PACKAGES, &folder).context("there is no nvcc, which $NVCC may name")?;
            nvcc.version()?;
        }
        Ok(nvcc)
    }

    /// The compiler's version, in one line.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn version(&self) -> Result<String> {
        let output = Command::new(&self.0).arg("--version").output();
        let output = output.with_context(|| format!("cannot run {}", self.0.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().rfind(|line| line.starts_with("Build"));
        line.map(str::to_owned).with_context(|| format!("{} is no nvcc", self.0.display()))
    }

    /// The folder of the CUDA libraries, which the packages' `nvcc` does not search by itself.
    pub fn libraries(&self) -> Option<PathBuf> {
        let folder = self.0.parent()?.parent()?.join("lib");
        folder.is_dir().then_some(folder)
    }

    /// Compiles or links `sources` to `target`.
    ///
    /// # Errors
    /// With the compiler's messages, if it fails.
    pub fn run(&self, flags: &[&str], sources: &[PathBuf], target: &Path) -> Result<()> {
        let output = Command::new(&self.0).args(flags).args(sources).arg("-o").arg(target).output();
        let output = output.with_context(|| format!("cannot run {}", self.0.display()))?;
        if output.status.success() {
            return Ok(());
        }
        bail!("{}: {}", target.display(), String::from_utf8_lossy(&output.stderr))
    }
}

/// Header folders of FlashInfer, CUTLASS and CCCL, which are installed into the user's cache directory if they are
/// missing.
///
/// # Errors
/// If pip cannot install them.
pub fn library_headers() -> Result<[PathBuf; 5]> {
    let folder = cache_folder(LIBRARY_HEADERS)?;
    let data = folder.join("flashinfer/data");
    if !data.is_dir() {
        install(&[LIBRARY_HEADERS], &folder)?;
    }
    let inside =
        ["include", "cutlass/include", "cccl/libcudacxx/include", "cccl/cub", "cccl/thrust"];
    Ok(inside.map(|headers| data.join(headers)))
}

/// A folder of the user's cache directory for what is installed under this name.
///
/// # Errors
/// If there is no cache directory.
pub fn cache_folder(name: &str) -> Result<PathBuf> {
    let cache = dirs::cache_dir().context("no cache directory; set HOME")?;
    Ok(cache.join("loramux").join(name))
}

/// Installs packages from PyPI into a folder, without what they depend on.
///
/// # Errors
/// If pip cannot be run or cannot install them.
pub fn install(packages: &[&str], folder: &Path) -> Result<()> {
    eprintln!("installing {} into {}", packages.join(", "), folder.display());
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]).arg(folder);
    let status = pip.args(packages).status().context("cannot run python3")?;
    if status.success() {
        return Ok(());
    }
    bail!("pip could not install {}; check the network", packages.join(", "))
}
