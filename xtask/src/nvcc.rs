//! The compiler of CUDA: an installed one, or that of NVIDIA's packages on PyPI.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Packages that make a compiler, of the CUDA version that the kernels are for.
const PACKAGES: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
];

/// Where the packages put CUDA.
const INSIDE: &str = "nvidia/cu13";

/// A compiler.
pub struct Nvcc(PathBuf);

impl Nvcc {
    /// The compiler that `$NVCC` names, else the one on `$PATH`, else the packages' in the user's
    /// cache directory, which are installed there if need be.
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
        let cache = dirs::cache_dir().context("there is no cache directory; set NVCC")?;
        let folder = cache.join("polylora").join("cuda-13.0");
        let nvcc = Self(folder.join(INSIDE).join("bin").join("nvcc"));
        if nvcc.version().is_err() {
            install(&folder)?;
            nvcc.version()?;
        }
        Ok(nvcc)
    }

    /// What the compiler says of itself, in one line.
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

    /// Compiles one file.
    ///
    /// # Errors
    /// With what the compiler said, if it refused.
    pub fn compile(&self, flags: &[&str], source: &Path, target: &Path) -> Result<()> {
        let output = Command::new(&self.0).args(flags).arg(source).arg("-o").arg(target).output();
        let output = output.with_context(|| format!("cannot run {}", self.0.display()))?;
        if output.status.success() {
            return Ok(());
        }
        bail!("{}: {}", source.display(), String::from_utf8_lossy(&output.stderr))
    }
}

fn install(folder: &Path) -> Result<()> {
    eprintln!("installing {} into {}", PACKAGES.join(", "), folder.display());
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]).arg(folder);
    let status = pip.args(PACKAGES).status().context("cannot run python3; set NVCC")?;
    if status.success() {
        return Ok(());
    }
    bail!("pip could not install the compiler; check the network, or set NVCC")
}
