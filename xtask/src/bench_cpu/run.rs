//! Running one model on the CPU backend.

use lora_cpu_ref::CpuRef;

use super::report::Row;
use super::{Args, memory};
use crate::serving::{Load, Serving, ServingPlan};

/// A loaded model, with as many synthetic adapters as the largest row of the table needs.
pub struct Bench {
    name: String,
    serving: Serving,
}

impl Bench {
    /// Loads a model and makes its adapters.
    pub fn start(model: &str, args: &Args) -> anyhow::Result<Self> {
        let batch = args.batches.iter().copied().max().unwrap_or(1);
        let plan = ServingPlan {
            model,
            quant: None,
            batch,
            adapters: args.adapters.iter().copied().max().unwrap_or(0),
            rank: args.rank,
            length: args.prompt + args.new_tokens,
            step_tokens: batch * args.prompt,
            no_overlap: false,
        };
        let threads = args.threads;
        let serving = Serving::start(&plan, move || CpuRef::with_threads(threads))?;
        Ok(Self { name: model.to_owned(), serving })
    }

    /// Measures a batch whose sequences use `adapters` adapters round-robin.
    pub fn measure(&self, batch: usize, adapters: usize, args: &Args) -> anyhow::Result<Row> {
        let plain_read_gb_per_s = memory::read_rate();
        let load = Load { batch, adapters, prompt: args.prompt, new_tokens: args.new_tokens };
        let times = self.serving.measure(load, args.repeats)?;
        let step_bytes = self.serving.step_bytes(adapters);
        Ok(Row {
            model: self.name.clone(),
            batch,
            adapters,
            prefill_tokens_per_s: (batch * args.prompt) as f64 / times.prefill_s,
            step_ms: times.step_ms,
            decode_tokens_per_s: batch as f64 / times.step_ms * 1e3,
            step_bytes,
            read_gb_per_s: step_bytes as f64 / times.step_ms / 1e6,
            plain_read_gb_per_s,
        })
    }
}
