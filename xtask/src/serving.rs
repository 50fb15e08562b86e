//! The engine as benchmarks run it: a model, synthetic adapters and uniform batches of requests.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use lora_core::testkit::{Recipe, write_peft};
use lora_core::{Backend, LoraConfig, LoraRequest, ModelGeometry, QuantConfig};
use loramux_engine::{GenerateRequest, KvCacheConfig, Llm, LoadFormat, Prompt, SamplingParams};

use crate::median::median;

/// What to start an engine with.
pub struct ServingPlan<'a> {
    /// `demo`, or the name of a folder under `bench/models`.
    pub model: &'a str,
    /// Quantises the weights at load.
    pub quant: Option<QuantConfig>,
    /// The largest batch.
    pub batch: usize,
    /// The most adapters.
    pub adapters: usize,
    /// Rank of the adapters, which are on all seven linear modules.
    pub rank: usize,
    /// The longest sequence, in tokens.
    pub length: usize,
    /// Most tokens of one step.
    pub step_tokens: usize,
    /// Turns overlap scheduling off; otherwise it is on where the device is asynchronous.
    pub no_overlap: bool,
}

/// One batch of requests.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Sequences.
    pub batch: usize,
    /// Adapters, assigned to sequences round-robin; 0 runs the base model.
    pub adapters: usize,
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Tokens generated for each prompt.
    pub new_tokens: usize,
}

/// Medians of one load.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Seconds until every sequence had its first token.
    pub prefill_s: f64,
    /// Milliseconds of a decode step.
    pub step_ms: f64,
}

/// Times of one run of a [`Load`].
struct Run {
    /// Seconds until every sequence had its first token.
    prefill_s: f64,
    /// Milliseconds of every decode step.
    step_ms: Vec<f64>,
}

/// A model with synthetic adapters.
pub struct Serving {
    llm: Llm,
    adapters: Vec<LoraRequest>,
    read_bytes: ReadBytes,
    /// Keeps the adapters' files alive.
    _dir: tempfile::TempDir,
}

impl Serving {
    /// Loads a model and makes its adapters.
    pub fn start<B: Backend>(
        plan: &ServingPlan<'_>,
        backend: impl FnOnce() -> lora_core::Result<B> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let start = Instant::now();
        let (path, format) = locate(plan.model)?;
        let max_loras = Some(plan.adapters.max(1));
        let mut builder = Llm::builder(&path)
            .load_format(format)
            .lora_config(LoraConfig { max_loras, ..LoraConfig::default() })
            .max_num_tokens(plan.step_tokens)
            .max_batch_size(plan.batch)
            .max_seq_len(plan.length)
            // Otherwise a repeated prompt would be a prefix-cache hit and skip prefill.
            .kv_cache_config(KvCacheConfig {
                enable_block_reuse: false,
                ..KvCacheConfig::default()
            });
        if let Some(quant) = plan.quant.clone() {
            builder = builder.quant_config(quant);
        }
        if plan.no_overlap {
            builder = builder.disable_overlap_scheduler(true);
        }
        let llm = builder.build(backend);
        let llm = llm.with_context(|| format!("loading {}", path.display()))?;
        eprintln!("{} loaded in {:.1} s", plan.model, start.elapsed().as_secs_f64());
        let dir = tempfile::tempdir()?;
        let geometry = &llm.info().geometry;
        let adapters = (0..plan.adapters)
            .map(|i| {
                let path = dir.path().join(i.to_string());
                let (rank, seed) = (plan.rank, i as u64 + 1);
                write_peft(&path, geometry, Recipe { rank, alpha: 16.0, limit: 0.01, seed })?;
                Ok(LoraRequest::new(format!("adapter-{i}"), i as i64, path))
            })
            .collect::<std::io::Result<_>>()?;
        let read_bytes = ReadBytes::new(geometry, plan.rank);
        Ok(Self { llm, adapters, read_bytes, _dir: dir })
    }

    /// Bytes of 16-bit weights that a decode step reads, adapters included.
    pub fn step_bytes(&self, adapters: usize) -> u64 {
        self.read_bytes.model + adapters as u64 * self.read_bytes.adapter
    }

    /// The medians over `repeats` runs, after one warm-up run.
    pub fn measure(&self, load: Load, repeats: usize) -> anyhow::Result<Times> {
        self.run(Load { new_tokens: load.new_tokens.min(2), ..load })?;
        let (mut prefills, mut steps) = (Vec::new(), Vec::new());
        for _ in 0..repeats.max(1) {
            let run = self.run(load)?;
            prefills.push(run.prefill_s);
            steps.extend(run.step_ms);
        }
        Ok(Times { prefill_s: median(prefills), step_ms: median(steps) })
    }

    /// Runs one batch and times its steps.
    fn run(&self, load: Load) -> anyhow::Result<Run> {
        let Load { batch, adapters, prompt, new_tokens } = load;
        let vocab = self.llm.info().model.vocab;
        let requests = (0..batch).map(|i| GenerateRequest {
            prompt: Prompt::Ids((0..prompt).map(|p| token(i, p, vocab)).collect()),
            sampling: SamplingParams {
                max_tokens: Some(new_tokens),
                ignore_eos: true,
                detokenize: false,
                ..SamplingParams::default()
            },
            lora: (adapters > 0).then(|| self.adapters[i % adapters].clone()),
        });
        let requests = requests.collect();
        // Tokens of one step arrive together, so that of the last sequence marks the end of a step.
        let mut arrivals = Vec::with_capacity(new_tokens);
        let start = Instant::now();
        let answers = self.llm.generate_each(requests, &mut |update| {
            if update.request + 1 == batch && !update.finished {
                arrivals.push(start.elapsed().as_secs_f64());
            }
        });
        for answer in answers {
            answer?;
        }
        ensure!(arrivals.len() == new_tokens, "{} tokens instead of {new_tokens}", arrivals.len());
        let step_ms = arrivals.windows(2).map(|w| (w[1] - w[0]) * 1e3).collect();
        Ok(Run { prefill_s: arrivals[0], step_ms })
    }
}

/// A token id that depends only on sequence and position.
fn token(sequence: usize, position: usize, vocab: usize) -> u32 {
    ((sequence * 7919 + position * 104_729 + 13) % vocab) as u32
}

/// Finds a model: the demo's in the user's cache; others are only a `config.json`, beside the program or
/// in the checkout, and get random weights.
fn locate(model: &str) -> anyhow::Result<(PathBuf, LoadFormat)> {
    if model == "demo" {
        return Ok((loramux::model_fetch::fetch_model()?, LoadFormat::Auto));
    }
    let beside = std::env::current_exe()?.with_file_name("models").join(model);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/models").join(model);
    Ok((if beside.is_dir() { beside } else { source }, LoadFormat::Dummy))
}

/// Bytes that a decode step reads in 16 bits.
struct ReadBytes {
    /// Of the base model: every layer and the output projection.
    model: u64,
    /// Of one adapter.
    adapter: u64,
}

impl ReadBytes {
    fn new(model: &ModelGeometry, rank: usize) -> Self {
        let dims: Vec<(usize, usize)> =
            model.modules().into_iter().filter_map(|module| model.dims(module)).collect();
        let weights: usize = dims.iter().map(|(i, o)| i * o).sum();
        let factors: usize = dims.iter().map(|(i, o)| rank * (i + o)).sum();
        let lm_head = model.vocab * model.hidden;
        Self {
            model: 2 * (model.layers * weights + lm_head) as u64,
            adapter: 2 * (model.layers * factors) as u64,
        }
    }
}
