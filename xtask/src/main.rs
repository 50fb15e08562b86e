//! Development commands; run them as `cargo xtask COMMAND`.

mod bench_cpu;
mod docs;

use clap::{Parser, Subcommand};

/// Development commands of polylora.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measures decode and prefill on the CPU, with a plain memory read beside them.
    BenchCpu(bench_cpu::Args),
    /// Writes the pages under `docs` that are made of tables in the code.
    Docs,
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::BenchCpu(args) => bench_cpu::run(&args),
        Command::Docs => docs::write(),
    }
}
