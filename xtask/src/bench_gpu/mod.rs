//! `cargo xtask bench-gpu`: what adapters cost on the GPU, in one layer and in whole steps, beside the hardware's
//! floor and other engines.

mod attention;
mod layer;
mod report;
mod steps;

use anyhow::{Context, Result};
use lora_core::Backend;
use lora_cuda::Cuda;

use layer::{Batch, Layer};
use report::{Measured, Row};

use crate::median::median;

/// Arguments of `cargo xtask bench-gpu`.
#[derive(clap::Args)]
pub struct Args {
    /// What to measure
    #[arg(long, value_enum, default_value_t = What::Layers)]
    what: What,
    /// Timed replays of each CUDA graph; the median is reported
    #[arg(long, default_value_t = 21)]
    replays: usize,
    /// Measure only cases of this rank
    #[arg(long)]
    rank: Option<usize>,
    /// Measure only cases with this number of tokens in a step
    #[arg(long)]
    tokens: Option<usize>,
    /// Turn overlap scheduling off: launch each step only once the tokens of the one before are known
    #[arg(long)]
    no_overlap: bool,
}

/// The benchmarks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum What {
    /// Time that adapters add to the linear modules of one layer
    Layers,
    /// Engine steps with bf16 weights
    Steps,
    /// Engine steps with FP8 weights
    StepsFp8,
    /// Prefill attention, by FlashInfer's kernel and by the crate's own
    Attention,
}

impl Args {
    fn wants(&self, case: &Case) -> bool {
        let is = |wanted: Option<usize>, found| wanted.is_none_or(|wanted| wanted == found);
        is(self.rank, case.rank) && is(self.tokens, case.tokens)
    }
}

/// One row of the table: a batch on one layer of Llama-3-8B, and what adapters add elsewhere, in microseconds.
struct Case {
    rank: usize,
    tokens: usize,
    adapters: usize,
    peers: Peers,
    /// What adapters should add here at most.
    target: f64,
}

/// What adapters add in other engines on an H200, in microseconds, where it was measured.
#[derive(Clone, Copy)]
struct Peers {
    /// vLLM 0.26.0.
    vllm: Option<f64>,
    /// SGLang 0.5.23, by the faster of its engines (`triton_v2`, where that was measured).
    sglang: Option<f64>,
}

const fn measured(vllm: f64, sglang: f64) -> Peers {
    Peers { vllm: Some(vllm), sglang: Some(sglang) }
}

const UNKNOWN: Peers = Peers { vllm: None, sglang: None };

const fn case(rank: usize, tokens: usize, adapters: usize, peers: Peers, target: f64) -> Case {
    Case { rank, tokens, adapters, peers, target }
}

const CASES: [Case; 11] = [
    case(16, 1, 1, measured(51.0, 10.0), 4.0),
    case(16, 64, 1, measured(45.0, 22.0), 9.0),
    case(16, 64, 8, measured(134.0, 27.0), 13.0),
    case(16, 64, 64, measured(901.0, 101.0), 60.0),
    case(16, 256, 8, measured(198.0, 60.0), 30.0),
    case(16, 256, 64, measured(928.0, 111.0), 65.0),
    case(16, 2048, 1, measured(545.0, 1617.0), 70.0),
    case(16, 2048, 8, measured(747.0, 1621.0), 75.0),
    case(64, 64, 8, UNKNOWN, 40.0),
    case(64, 64, 64, UNKNOWN, 200.0),
    case(64, 2048, 8, UNKNOWN, 110.0),
];

/// Layers run in turn, each with its own weights, so that L2 is cold for each.
const LAYERS: usize = 2;

/// Runs the benchmark of `args`.
///
/// # Errors
/// If no GPU is present, or a result differs from the formula.
pub fn run(args: &Args) -> Result<()> {
    match args.what {
        What::Layers => layers(args),
        What::Steps => steps::run(false, args.tokens, args.no_overlap),
        What::StepsFp8 => steps::run(true, args.tokens, args.no_overlap),
        What::Attention => attention::run(args.replays),
    }
}

/// Measures every case and prints a JSON line for each, then the table.
fn layers(args: &Args) -> Result<()> {
    let cuda = Cuda::new(0)?;
    println!("{}, kernels {}", cuda.device_name(), lora_cuda::kernels::version());
    let mut q = cuda.queue()?;
    let mut layers = (0..LAYERS).map(|_| Layer::new(&cuda)).collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for case in CASES.iter().filter(|case| args.wants(case)) {
        let mut batch = Batch::new(&cuda, &mut q, case.tokens, case.adapters)?;
        for layer in &mut layers {
            layer.load_adapters(&cuda, &mut q, case.adapters, case.rank)?;
            layer.check(&cuda, &mut q, &mut batch)?;
        }
        let measured = measure(&cuda, &mut q, &layers, &mut batch, args.replays)?;
        let row = Row::new(case, measured);
        println!("{}", serde_json::to_string(&row)?);
        rows.push(row);
    }
    println!("{}", report::table(&rows));
    Ok(())
}

/// Replays the layers without and with adapters, alternating, and takes the medians in microseconds a layer.
fn measure(
    cuda: &Cuda,
    q: &mut <Cuda as Backend>::Queue,
    layers: &[Layer],
    batch: &mut Batch,
    replays: usize,
) -> Result<Measured> {
    let mut graphs = Vec::new();
    for with_adapters in [false, true] {
        let graph = cuda.capture(q, |q| {
            layers.iter().try_for_each(|layer| layer.run(cuda, q, batch, with_adapters))
        })?;
        graphs.push(graph.context("the layers cannot be captured into a CUDA graph")?);
    }
    let mut times = [Vec::new(), Vec::new()];
    for replay in 0..replays + 3 {
        for (graph, times) in graphs.iter().zip(&mut times) {
            let ms = cuda.time(q, |q| cuda.replay(q, graph).map(drop))?;
            if replay >= 3 {
                times.push(f64::from(ms) * 1e3 / layers.len() as f64);
            }
        }
    }
    let [base, with_adapters] = times.map(median);
    Ok(Measured { base, with_adapters })
}
