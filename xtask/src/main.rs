//! Development commands; run them as `cargo xtask COMMAND`.

mod bench_cpu;
mod bench_load;
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
    /// Measures how fast an adapter on all routed experts is loaded, and in how much memory.
    BenchLoad(bench_load::Args),
    /// One measurement of `bench-load`.
    #[command(hide = true)]
    BenchLoadOnce(bench_load::OnceArgs),
    /// Writes the pages under `docs` that are made of tables in the code.
    Docs,
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::BenchCpu(args) => bench_cpu::run(&args),
        Command::BenchLoad(args) => bench_load::run(&args),
        Command::BenchLoadOnce(args) => bench_load::run_once(&args),
        Command::Docs => docs::write(),
    }
}
