//! `cargo xtask bench-load`: time and peak memory to load an adapter on all routed experts, beside a plain read of
//! its file.
//!
//! Each measurement runs in its own process, because the peak memory that the system reports for a process never
//! falls. Reads and loads alternate, after one read that warms the page cache.

mod once;
mod report;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use lora_core::formats::write;
use lora_core::testkit::{self, Recipe};
use lora_core::{ExpertLayout, ModelGeometry};

use once::{Measured, What};
pub use once::{OnceArgs, run as run_once};
use report::Row;

use crate::median::median;

/// Arguments of `cargo xtask bench-load`; the default sizes are those of Qwen3-30B-A3B.
#[derive(clap::Args)]
pub struct Args {
    /// Layouts to measure, by their `moe_layout` names.
    #[arg(long, value_delimiter = ',', default_values = ["per-expert", "stacked", "target-parameters"])]
    layouts: Vec<String>,
    /// Routed experts in a layer.
    #[arg(long, default_value_t = 128)]
    experts: usize,
    /// Layers.
    #[arg(long, default_value_t = 48)]
    layers: usize,
    /// Rank of every expert.
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Hidden width of the model.
    #[arg(long, default_value_t = 2048)]
    hidden: usize,
    /// Intermediate width of one expert.
    #[arg(long, default_value_t = 768)]
    inner: usize,
    /// Repeats of each read and load; the medians are reported.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Append a JSON line for each layout to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Measures and prints.
///
/// # Errors
/// If an adapter cannot be written or loaded.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let recipe = Recipe { rank: args.rank, alpha: 32.0, limit: 0.01, seed: 1 };
    let adapter = testkit::random_adapter(&geometry(args), recipe);
    let mut rows = Vec::new();
    for name in &args.layouts {
        let layout = layout(name)?;
        let dir = tempfile::tempdir().context("a directory for the adapter")?;
        let path = dir.path().join("adapter");
        write::peft(&path, &adapter, layout)?;
        rows.push(measure(layout, &path, args.repeats)?);
        eprintln!("{}", rows[rows.len() - 1].line());
    }
    println!("{}", report::table(&rows));
    if let Some(path) = &args.json {
        let file = File::options().create(true).append(true).open(path);
        let mut file = file.with_context(|| path.display().to_string())?;
        for row in &rows {
            writeln!(file, "{}", serde_json::to_string(row)?).context("writing results")?;
        }
    }
    Ok(())
}

fn layout(name: &str) -> anyhow::Result<ExpertLayout> {
    let names = ExpertLayout::ALL.map(ExpertLayout::name).join(", ");
    let found = ExpertLayout::ALL.into_iter().find(|layout| layout.name() == name);
    found.with_context(|| format!("--layouts: found {name:?}, allowed are {names}"))
}

/// A model of routed experts only.
fn geometry(args: &Args) -> ModelGeometry {
    ModelGeometry {
        hidden: args.hidden,
        intermediate: args.inner,
        layers: args.layers,
        heads: 1,
        kv_heads: 1,
        head_dim: args.hidden,
        vocab: 1,
        num_experts: args.experts,
        moe_intermediate: args.inner,
        qk_norms: false,
        tied_embeddings: false,
        hf_modules: Vec::new(),
        biased_modules: std::collections::BTreeSet::new(),
    }
}

fn measure(layout: ExpertLayout, path: &Path, repeats: usize) -> anyhow::Result<Row> {
    let weights = path.join("adapter_model.safetensors");
    let file_bytes = weights.metadata()?.len();
    spawn(What::Read, &weights)?;
    let (mut reads, mut loads) = (Vec::new(), Vec::new());
    for _ in 0..repeats.max(1) {
        reads.push(spawn(What::Read, &weights)?);
        loads.push(spawn(What::Load, path)?);
    }
    let seconds = |measured: &[Measured]| median(measured.iter().map(|m| m.seconds).collect());
    Ok(Row {
        layout: layout.name(),
        file_bytes,
        read_s: seconds(&reads),
        load_s: seconds(&loads),
        peak_bytes: loads.iter().map(|load| load.peak_bytes).max().unwrap_or(0),
    })
}

/// Runs one measurement in a process of its own.
fn spawn(what: What, path: &Path) -> anyhow::Result<Measured> {
    let program = std::env::current_exe().context("the path of this program")?;
    let output = Command::new(program)
        .args(["bench-load-once", what.name()])
        .arg(path)
        .output()
        .context("cannot start the measuring process")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr));
    }
    serde_json::from_slice(&output.stdout).context("the measuring process wrote no measurement")
}
