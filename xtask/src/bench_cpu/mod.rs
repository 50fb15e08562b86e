//! `cargo xtask bench-cpu`: tokens per second of the engine on the CPU backend.
//!
//! Every row is one call of `generate` with prompts of random tokens, after a warm-up of the same
//! adapters. The floor beside it is a plain read of as much memory, measured just before.

mod memory;
mod report;
mod run;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;

use report::Row;
use run::Bench;

/// What to measure.
#[derive(clap::Args)]
pub struct Args {
    /// Models: `demo`, or the name of a folder under `bench/models`.
    #[arg(long, value_delimiter = ',', default_values = ["demo", "llama-3.2-1b"])]
    models: Vec<String>,
    /// Sequences in the batch.
    #[arg(long, value_delimiter = ',', default_values = ["1", "4", "16"])]
    batches: Vec<usize>,
    /// Different adapters in the batch; 0 is the base model.
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
    /// Times each row is measured; the median is reported.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Threads; all cores unless given.
    #[arg(long)]
    threads: Option<usize>,
    /// Appends a JSON line for each row to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Measures and prints.
///
/// # Errors
/// If a model cannot be had or a request fails.
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
