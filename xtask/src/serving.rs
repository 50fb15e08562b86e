//! An engine under measurement.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use lora_core::testkit::{Recipe, write_peft};
use lora_core::{Backend, LoraConfig, LoraRequest, ModelGeometry, QuantConfig};
use loramux_engine::{GenerateRequest, KvCacheConfig, Llm, LoadFormat, Prompt, SamplingParams};

/// What an engine is started for.
pub struct Plan<'a> {
    /// `demo`, or the name of a folder under `bench/models`.
    pub model: &'a str,
    /// Weights in another format, quantised at load.
    pub quant: Option<QuantConfig>,
    /// The largest batch.
    pub batch: usize,
    /// The most adapters.
    pub adapters: usize,
    /// Rank of the adapters, which are on all seven linear modules.
    pub rank: usize,
    /// The longest sequence, in tokens.
    pub length: usize,
    /// Tokens of one step.
    pub step_tokens: usize,
    /// Whether steps may be launched ahead, where the device computes by itself.
    pub overlap: bool,
}

/// One batch of requests.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Sequences.
    pub batch: usize,
    /// Adapters, which take turns; 0 is the base model.
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

/// A model with synthetic adapters.
pub struct Serving {
    llm: Llm,
    adapters: Vec<LoraRequest>,
    weight_bytes: u64,
    adapter_bytes: u64,
    /// Holds the adapters' files.
    _dir: tempfile::TempDir,
}

impl Serving {
    /// Loads a model and makes its adapters.
    pub fn start<B: Backend>(
        plan: &Plan<'_>,
        backend: impl FnOnce() -> lora_core::Result<B> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let start = Instant::now();
        let (path, format) = locate(plan.model)?;
        let max_loras = Some(plan.adapters.max(1));
        let builder = Llm::builder(&path)
            .load_format(format)
            .lora_config(LoraConfig { max_loras, ..LoraConfig::default() })
            .max_num_tokens(plan.step_tokens)
            .max_batch_size(plan.batch)
            .max_seq_len(plan.length)
            // A prompt that comes again is computed again.
            .kv_cache_config(KvCacheConfig {
                enable_block_reuse: false,
                ..KvCacheConfig::default()
            });
        let builder = match plan.quant.clone() {
            Some(quant) => builder.quant_config(quant),
            None => builder,
        };
        let builder = match plan.overlap {
            true => builder,
            false => builder.disable_overlap_scheduler(true),
        };
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
        let (weight_bytes, adapter_bytes) = bytes(geometry, plan.rank);
        Ok(Self { llm, adapters, weight_bytes, adapter_bytes, _dir: dir })
    }

    /// Bytes of weights in 16 bits that a decode step has to read, adapters included.
    pub fn step_bytes(&self, adapters: usize) -> u64 {
        self.weight_bytes + adapters as u64 * self.adapter_bytes
    }

    /// The medians of some runs, after one that is not counted.
    pub fn measure(&self, load: Load, repeats: usize) -> anyhow::Result<Times> {
        self.call(Load { new_tokens: load.new_tokens.min(2), ..load })?;
        let (mut prefills, mut steps) = (Vec::new(), Vec::new());
        for _ in 0..repeats.max(1) {
            let (prefill, of_steps) = self.call(load)?;
            prefills.push(prefill);
            steps.extend(of_steps);
        }
        Ok(Times { prefill_s: median(prefills), step_ms: median(steps) })
    }

    /// Seconds until all first tokens, and milliseconds of every further step.
    fn call(&self, load: Load) -> anyhow::Result<(f64, Vec<f64>)> {
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
        // Tokens of one step arrive together, so the last sequence's mark the end of each step.
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
        let steps = arrivals.windows(2).map(|w| (w[1] - w[0]) * 1e3).collect();
        Ok((arrivals[0], steps))
    }
}

/// A token that depends on nothing but its place.
fn token(sequence: usize, position: usize, vocab: usize) -> u32 {
    ((sequence * 7919 + position * 104_729 + 13) % vocab) as u32
}

/// Where a model is: the demo's in its cache, others by their shape alone, beside the program or in
/// the sources.
fn locate(model: &str) -> anyhow::Result<(PathBuf, LoadFormat)> {
    if model == "demo" {
        return Ok((loramux::model_fetch::fetch_model()?, LoadFormat::Auto));
    }
    let beside = std::env::current_exe()?.with_file_name("models").join(model);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/models").join(model);
    Ok((if beside.is_dir() { beside } else { source }, LoadFormat::Dummy))
}

/// Bytes that a decode step reads of the base model, and of one adapter: everything in 16 bits.
fn bytes(model: &ModelGeometry, rank: usize) -> (u64, u64) {
    let dims: Vec<(usize, usize)> =
        model.modules().into_iter().filter_map(|module| model.dims(module)).collect();
    let weights: usize = dims.iter().map(|(i, o)| i * o).sum();
    let factors: usize = dims.iter().map(|(i, o)| rank * (i + o)).sum();
    let head = model.vocab * model.hidden;
    (2 * (model.layers * weights + head) as u64, 2 * (model.layers * factors) as u64)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
