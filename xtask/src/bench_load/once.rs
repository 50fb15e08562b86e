//! One measurement, for [`super::run`] to start as a process.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::ValueEnum;
use lora_core::formats::{self, ReadOptions};
use serde::{Deserialize, Serialize};

/// What a process does.
#[derive(Clone, Copy, ValueEnum)]
pub enum What {
    /// Reads a file into memory.
    Read,
    /// Loads the adapter of a directory.
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

/// What it took.
#[derive(Serialize, Deserialize)]
pub struct Measured {
    /// Time.
    pub seconds: f64,
    /// The most memory that the process ever had.
    pub peak_bytes: u64,
}

/// What to do, with what.
#[derive(clap::Args)]
pub struct OnceArgs {
    what: What,
    path: PathBuf,
}

/// Measures and writes one JSON object.
///
/// # Errors
/// If the file cannot be read or the adapter not be loaded.
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
