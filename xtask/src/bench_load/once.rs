//! One measurement, which [`super::run`] starts as a process.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::ValueEnum;
use lora_core::formats::{self, ReadOptions};
use serde::{Deserialize, Serialize};

/// The operation to measure.
#[derive(Clone, Copy, ValueEnum)]
pub enum What {
    /// Read a file into memory.
    Read,
    /// Load the adapter in a directory.
    Load,
}

impl What {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Load => "load",
        }
    }
}

/// Cost of the operation.
#[derive(Serialize, Deserialize)]
pub struct Measured {
    /// Wall time.
    pub seconds: f64,
    /// Peak resident memory of the process.
    pub peak_bytes: u64,
}

/// Arguments of the hidden command `bench-load-once`.
#[derive(clap::Args)]
pub struct OnceArgs {
    what: What,
    path: PathBuf,
}

/// Measures, and prints one JSON object.
///
/// # Errors
/// If the file cannot be read or the adapter cannot be loaded.
pub fn run(args: &OnceArgs) -> anyhow::Result<()> {
    let seconds = match args.what {
        What::Read => timed(|| Ok(std::fs::read(&args.path)?))?,
        What::Load => timed(|| Ok(formats::load(&args.path, &ReadOptions::default())?))?,
    };
    let peak_bytes = peak_bytes()?;
    println!("{}", serde_json::to_string(&Measured { seconds, peak_bytes })?);
    Ok(())
}

fn timed<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<f64> {
    let start = Instant::now();
    let result = work()?;
    let seconds = start.elapsed().as_secs_f64();
    drop(result);
    Ok(seconds)
}

/// The high-water mark of this process's resident memory.
fn peak_bytes() -> anyhow::Result<u64> {
    let path = Path::new("/proc/self/status");
    let status = std::fs::read_to_string(path).context("the kernel's report on this process")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix("kB"));
    let kibibytes = kibibytes.context("no VmHWM in the kernel's report")?.trim();
    Ok(kibibytes.parse::<u64>()? * 1024)
}
