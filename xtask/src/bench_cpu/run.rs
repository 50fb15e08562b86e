//! An engine under measurement.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use engine::{GenerateRequest, Llm, LoadFormat, Prompt, SamplingParams};
use lora_core::testkit::{Recipe, write_peft};
use lora_core::{LoraConfig, LoraRequest, ModelGeometry};
use lora_cpu_ref::CpuRef;

use super::report::Row;
use super::{Args, memory};

/// A model with as many synthetic adapters as the largest row needs.
pub struct Bench {
    name: String,
    llm: Llm,
    adapters: Vec<LoraRequest>,
    weight_bytes: u64,
    adapter_bytes: u64,
    /// Holds the adapters' files.
    _dir: tempfile::TempDir,
}

/// Times of one call.
struct Times {
    prefill_s: f64,
    steps_ms: Vec<f64>,
}

impl Bench {
    /// Loads a model and makes its adapters.
    pub fn start(model: &str, args: &Args) -> anyhow::Result<Self> {
        let (path, format) = locate(model)?;
        let most = args.adapters.iter().copied().max().unwrap_or(0);
        let tokens = args.batches.iter().max().unwrap_or(&1) * args.prompt;
        let length = args.prompt + args.new_tokens;
        let threads = args.threads;
        let llm = Llm::builder(&path)
            .load_format(format)
            .lora_config(LoraConfig { max_loras: Some(most.max(1)), ..LoraConfig::default() })
            .max_num_tokens(tokens)
            .max_batch_size(*args.batches.iter().max().unwrap_or(&1))
            .max_seq_len(length)
            .build(move || CpuRef::with_threads(threads))
            .with_context(|| format!("loading {}", path.display()))?;
        let dir = tempfile::tempdir()?;
        let geometry = &llm.info().geometry;
        let adapters = (0..most)
            .map(|i| {
                let path = dir.path().join(i.to_string());
                let (rank, seed) = (args.rank, i as u64 + 1);
                write_peft(&path, geometry, Recipe { rank, alpha: 16.0, limit: 0.01, seed })?;
                Ok(LoraRequest::new(format!("adapter-{i}"), i as i64, path))
            })
            .collect::<std::io::Result<_>>()?;
        let (weight_bytes, adapter_bytes) = bytes(geometry, args.rank);
        Ok(Self { name: model.to_owned(), llm, adapters, weight_bytes, adapter_bytes, _dir: dir })
    }

    /// Measures a batch in which `adapters` adapters take turns.
    pub fn measure(&self, batch: usize, adapters: usize, args: &Args) -> anyhow::Result<Row> {
        self.call(batch, adapters, args.prompt, 2)?;
        let plain_read_gb_per_s = memory::read_rate();
        let times = (0..args.repeats.max(1))
            .map(|_| self.call(batch, adapters, args.prompt, args.new_tokens))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let prefill_s = median(times.iter().map(|t| t.prefill_s).collect());
        let step_ms = median(times.into_iter().flat_map(|t| t.steps_ms).collect());
        let step_bytes = self.weight_bytes + adapters as u64 * self.adapter_bytes;
        Ok(Row {
            model: self.name.clone(),
            batch,
            adapters,
            prefill_tokens_per_s: (batch * args.prompt) as f64 / prefill_s,
            step_ms,
            decode_tokens_per_s: batch as f64 / step_ms * 1e3,
            step_bytes,
            read_gb_per_s: step_bytes as f64 / step_ms / 1e6,
            plain_read_gb_per_s,
        })
    }

    fn call(
        &self,
        batch: usize,
        adapters: usize,
        prompt: usize,
        new: usize,
    ) -> anyhow::Result<Times> {
        let vocab = self.llm.info().model.vocab;
        let requests = (0..batch).map(|i| GenerateRequest {
            prompt: Prompt::Ids((0..prompt).map(|p| token(i, p, vocab)).collect()),
            sampling: SamplingParams {
                max_tokens: Some(new),
                ignore_eos: true,
                detokenize: false,
                ..SamplingParams::default()
            },
            lora: (adapters > 0).then(|| self.adapters[i % adapters].clone()),
        });
        let requests = requests.collect();
        // Tokens of one step arrive together, so the last sequence's mark the end of each step.
        let mut arrivals = Vec::with_capacity(new);
        let start = Instant::now();
        let answers = self.llm.generate_each(requests, &mut |update| {
            if update.request + 1 == batch && !update.finished {
                arrivals.push(start.elapsed().as_secs_f64());
            }
        });
        for answer in answers {
            answer?;
        }
        ensure!(arrivals.len() == new, "{} tokens instead of {new}", arrivals.len());
        let steps_ms = arrivals.windows(2).map(|w| (w[1] - w[0]) * 1e3).collect();
        Ok(Times { prefill_s: arrivals[0], steps_ms })
    }
}

/// A token that depends on nothing but its place.
fn token(sequence: usize, position: usize, vocab: usize) -> u32 {
    ((sequence * 7919 + position * 104_729 + 13) % vocab) as u32
}

/// Where a model is: the demo's in its cache, others by their shape alone.
fn locate(model: &str) -> anyhow::Result<(PathBuf, LoadFormat)> {
    if model == "demo" {
        return Ok((cli::model_fetch::fetch_model()?, LoadFormat::Auto));
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/models");
    Ok((root.join(model), LoadFormat::Dummy))
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
