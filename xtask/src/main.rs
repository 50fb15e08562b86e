//! Development commands; run them as `cargo xtask COMMAND`.

mod bench_cpu;
mod bench_gpu;
mod bench_load;
mod docs;
mod folder;
mod format_kernels;
mod kernels;
mod median;
mod model_pack;
mod nvcc;
mod parity;
mod serving;
mod test_gpu;

use clap::{Parser, Subcommand};

/// Development commands of loramux.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measures prefill and decode on the CPU, beside the bandwidth of a plain memory read.
    BenchCpu(bench_cpu::Args),
    /// Measures time and peak memory to load an adapter on all routed experts.
    BenchLoad(bench_load::Args),
    /// Runs one measurement of `bench-load`.
    #[command(hide = true)]
    BenchLoadOnce(bench_load::OnceArgs),
    /// Compiles the CUDA kernels, with nvcc from PyPI if none is installed.
    Kernels(kernels::Args),
    /// Formats the CUDA kernels, with clang-format from PyPI.
    FormatKernels(format_kernels::Args),
    /// Runs the tests of the CUDA backend, or packs them for a machine without a toolchain.
    TestGpu(test_gpu::Args),
    /// Measures a layer, whole steps and attention on the GPU, beside other engines.
    BenchGpu(bench_gpu::Args),
    /// Regenerates the pages under `docs` that come from tables in the code.
    Docs,
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::BenchCpu(args) => bench_cpu::run(&args),
        Command::BenchLoad(args) => bench_load::run(&args),
        Command::BenchLoadOnce(args) => bench_load::run_once(&args),
        Command::Kernels(args) => kernels::run(&args),
        Command::FormatKernels(args) => format_kernels::run(&args),
        Command::TestGpu(args) => test_gpu::run(&args),
        Command::BenchGpu(args) => bench_gpu::run(&args),
        Command::Docs => docs::write(),
    }
}
