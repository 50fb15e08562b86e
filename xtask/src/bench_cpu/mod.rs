//! `cargo xtask bench-cpu`: tokens per second of the engine on the CPU backend.
//!
//! Every row is a batch of prompts of random tokens, after a warm-up with the same adapters. The floor beside it is the
//! bandwidth of a plain parallel read of memory, measured just before, as a decode step reads all weights once.

mod memory;
mod report;
mod run;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;

use report::Row;
use run::Bench;

/// Arguments of `cargo xtask bench-cpu`.
#[derive(clap::Args)]
pub struct Args {
    /// Models: `demo`, or names of folders in `bench/models`.
    #[arg(long, value_delimiter = ',', default_values = ["demo", "llama-3.2-1b"])]
    models: Vec<String>,
    /// Batch sizes, in sequences.
    #[arg(long, value_delimiter = ',', default_values = ["1", "4", "16"])]
    batches: Vec<usize>,
    /// Numbers of different adapters in the batch; 0: the base model.
    #[arg(long, value_delimiter = ',', default_values = ["0", "1", "4"])]
    adapters: Vec<usize>,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 128)]
    prompt: usize,
    /// Tokens generated for each prompt.
    #[arg(long, default_value_t = 32)]
    new_tokens: usize,
    /// Rank of the adapters, which are on all seven linear modules.
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Repeats of each row; the median is reported.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// CPU threads; all cores by default.
    #[arg(long)]
    threads: Option<usize>,
    /// Append a JSON line for each row to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Measures and prints.
///
/// # Errors
/// If a model cannot be loaded or a request fails.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut rows: Vec<Row> = Vec::new();
    for model in &args.models {
        let bench = Bench::start(model, args)?;
        for batch in &args.batches {
            for adapters in args.adapters.iter().filter(|n| *n <= batch) {
                rows.push(bench.measure(*batch, *adapters, args)?);
                eprintln!("{}", rows[rows.len() - 1].line());
            }
        }
    }
    println!("{}", report::table(&rows));
    if let Some(path) = &args.json {
        let mut file = File::options().create(true).append(true).open(path);
        let file = file.as_mut().map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?;
        for row in &rows {
            writeln!(file, "{}", serde_json::to_string(row)?).context("writing results")?;
        }
    }
    Ok(())
}
