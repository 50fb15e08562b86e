//! `cargo xtask bench-gpu`: layers and whole steps with adapters on the GPU, beside floors and peers.

mod attention;
mod layer;
mod report;
mod steps;

use anyhow::{Context, Result};
use lora_core::Backend;
use lora_cuda::Cuda;

use layer::{Batch, Layer};
use report::{Measured, Row};

/// Arguments of `cargo xtask bench-gpu`.
#[derive(clap::Args)]
pub struct Args {
    /// What to measure
    #[arg(long, value_enum, default_value_t = What::Layers)]
    what: What,
    /// Replays of each recorded layer, of which the median counts
    #[arg(long, default_value_t = 21)]
    replays: usize,
    /// Only cases with this rank
    #[arg(long)]
    rank: Option<usize>,
    /// Only cases with this number of tokens in a step
    #[arg(long)]
    tokens: Option<usize>,
    /// Have each step of the engine wait for the tokens of the one before
    #[arg(long)]
    no_overlap: bool,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum What {
    /// What adapters add to the products of one layer
    Layers,
    /// Steps of the engine with weights in bf16
    Steps,
    /// Steps of the engine with weights in FP8
    StepsFp8,
    /// Attention of prompts, by FlashInfer and by the crate's own kernel
    Attention,
}

impl Args {
    fn wants(&self, case: &Case) -> bool {
        let is = |wanted: Option<usize>, found| wanted.is_none_or(|wanted| wanted == found);
        is(self.rank, case.rank) && is(self.tokens, case.tokens)
    }
}

/// One row of the table: a batch on one layer of Llama-3-8B, with what others add to it.
struct Case {
    rank: usize,
    tokens: usize,
    adapters: usize,
    /// Microseconds that vLLM 0.26.0 and SGLang 0.5.23 (its faster engine, `triton_v2`, where that was measured)
    /// add on an H200, and what is to be reached.
    vllm: Option<f32>,
    sglang: Option<f32>,
    target: f32,
}

const fn case(dims: [usize; 3], peers: [Option<f32>; 2], target: f32) -> Case {
    let ([rank, tokens, adapters], [vllm, sglang]) = (dims, peers);
    Case { rank, tokens, adapters, vllm, sglang, target }
}

const CASES: [Case; 11] = [
    case([16, 1, 1], [Some(51.0), Some(10.0)], 4.0),
    case([16, 64, 1], [Some(45.0), Some(22.0)], 9.0),
    case([16, 64, 8], [Some(134.0), Some(27.0)], 13.0),
    case([16, 64, 64], [Some(901.0), Some(101.0)], 60.0),
    case([16, 256, 8], [Some(198.0), Some(60.0)], 30.0),
    case([16, 256, 64], [Some(928.0), Some(111.0)], 65.0),
    case([16, 2048, 1], [Some(545.0), Some(1617.0)], 70.0),
    case([16, 2048, 8], [Some(747.0), Some(1621.0)], 75.0),
    case([64, 64, 8], [None, None], 40.0),
    case([64, 64, 64], [None, None], 200.0),
    case([64, 2048, 8], [None, None], 110.0),
];

/// Layers with weights of their own, so that one finds none of its own in the cache.
const LAYERS: usize = 2;

/// Measures what is asked for.
///
/// # Errors
/// If there is no GPU, or a result is wrong.
pub fn run(args: &Args) -> Result<()> {
    match args.what {
        What::Layers => layers(args),
        What::Steps => steps::run(false, args.tokens, !args.no_overlap),
        What::StepsFp8 => steps::run(true, args.tokens, !args.no_overlap),
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

/// The medians of replays without and with adapters, in turn, in microseconds a layer.
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
        graphs.push(graph.context("the layers cannot be recorded")?);
    }
    let mut times = [Vec::new(), Vec::new()];
    for replay in 0..replays + 3 {
        for (graph, times) in graphs.iter().zip(&mut times) {
            let ms = cuda.time(q, |q| cuda.replay(q, graph).map(drop))?;
            if replay >= 3 {
                times.push(ms * 1e3 / layers.len() as f32);
            }
        }
    }
    let [base, with_adapters] = times.map(median);
    Ok(Measured { base, with_adapters })
}

fn median(mut values: Vec<f32>) -> f32 {
    values.sort_by(f32::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
