//! Prefill and decode steps of the whole engine: Llama-3-8B's shape with random weights, prompts and answers of
//! 128 tokens, adapters on all seven linear modules.

use std::time::Instant;

use anyhow::Result;
use comfy_table::Table;
use lora_core::{QuantAlgo, QuantConfig};
use lora_cuda::Cuda;
use serde::Serialize;

use crate::serving::{Load, Serving, ServingPlan};

/// A batch, and its times elsewhere in milliseconds.
struct Case {
    batch: usize,
    adapters: usize,
    prompt: usize,
    times: Times,
}

/// Milliseconds to compare a step with.
#[derive(Clone, Copy)]
struct Times {
    /// vLLM 0.26.0 on an H200, without adapters.
    vllm_base: f64,
    /// vLLM 0.26.0 on an H200, with adapters.
    vllm: f64,
    /// What a step with adapters should take here at most.
    target: f64,
}

const fn times(vllm_base: f64, vllm: f64, target: f64) -> Times {
    Times { vllm_base, vllm, target }
}

const fn decode(batch: usize, adapters: usize, times: Times) -> Case {
    Case { batch, adapters, prompt: 128, times }
}

const fn prefill(times: Times) -> Case {
    Case { batch: 1, adapters: 1, prompt: 2048, times }
}

impl Case {
    fn is_prefill(&self) -> bool {
        self.prompt > 128
    }

    /// Tokens of the measured step.
    fn tokens(&self) -> usize {
        if self.is_prefill() { self.prompt } else { self.batch }
    }
}

const BF16: [Case; 6] = [
    decode(1, 1, times(4.77, 6.69, 4.1)),
    decode(8, 8, times(4.91, 9.02, 4.4)),
    decode(64, 1, times(5.87, 7.59, 5.4)),
    decode(64, 8, times(5.87, 10.16, 5.6)),
    decode(256, 8, times(10.63, 16.40, 9.7)),
    prefill(times(51.7, 68.7, 46.0)),
];

const FP8: [Case; 4] = [
    decode(1, 1, times(3.40, 5.09, 2.9)),
    decode(8, 8, times(3.52, 7.60, 3.2)),
    decode(64, 8, times(4.38, 8.68, 4.5)),
    prefill(times(32.9, 67.8, 31.0)),
];

/// Rank of the adapters.
const RANK: usize = 16;

/// Adapters that are loaded.
const ADAPTERS: usize = 8;

/// Tokens generated for each prompt where decode steps are measured.
const NEW_TOKENS: usize = 128;

/// One case and its times in milliseconds.
#[derive(Clone, Debug, Serialize)]
struct Row {
    weights: &'static str,
    batch: usize,
    adapters: usize,
    what: &'static str,
    base: f64,
    with_adapters: f64,
    vllm_base: f64,
    vllm: f64,
    target: f64,
}

/// Measures every case, or only those with `tokens` in a step, and prints a JSON line for each, then the table.
/// Weights are in FP8 if `fp8` is set, else in bf16; `no_overlap` turns overlap scheduling off.
///
/// # Errors
/// If no GPU is present, or a request fails.
pub fn run(fp8: bool, tokens: Option<usize>, no_overlap: bool) -> Result<()> {
    let (weights, cases): (_, &[Case]) = if fp8 { ("fp8", &FP8) } else { ("bf16", &BF16) };
    let quant =
        fp8.then(|| QuantConfig { quant_algo: Some(QuantAlgo::Fp8), ..QuantConfig::default() });
    let plan = ServingPlan {
        model: "llama-3-8b",
        quant,
        batch: cases.iter().map(|case| case.batch).max().unwrap_or(1),
        adapters: ADAPTERS,
        rank: RANK,
        length: 2048 + NEW_TOKENS,
        step_tokens: 2048,
        no_overlap,
    };
    let serving = Serving::start(&plan, || Cuda::new(0).map_err(Into::into))?;
    let start = Instant::now();
    serving.measure(Load { batch: 1, adapters: 0, prompt: 128, new_tokens: 1 }, 1)?;
    println!("{weights}: two first tokens took {:.2} s", start.elapsed().as_secs_f64());
    let wanted = |case: &&Case| tokens.is_none_or(|tokens| case.tokens() == tokens);
    let rows = cases.iter().filter(wanted).map(|case| measure(&serving, case, weights));
    let rows = rows.collect::<Result<Vec<_>>>()?;
    println!("{}", table(&rows));
    Ok(())
}

fn measure(serving: &Serving, case: &Case, weights: &'static str) -> Result<Row> {
    let is_prefill = case.is_prefill();
    let time = |adapters| {
        let new_tokens = if is_prefill { 1 } else { NEW_TOKENS };
        let load = Load { batch: case.batch, adapters, prompt: case.prompt, new_tokens };
        let times = serving.measure(load, if is_prefill { 5 } else { 1 })?;
        anyhow::Ok(if is_prefill { times.prefill_s * 1e3 } else { times.step_ms })
    };
    let row = Row {
        weights,
        batch: case.batch,
        adapters: case.adapters,
        what: if is_prefill { "prefill of 2048" } else { "decode step" },
        base: time(0)?,
        with_adapters: time(case.adapters)?,
        vllm_base: case.times.vllm_base,
        vllm: case.times.vllm,
        target: case.times.target,
    };
    println!("{}", serde_json::to_string(&row)?);
    Ok(row)
}

/// The rows as a table.
fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.set_header([
        "weights",
        "batch",
        "adapters",
        "what",
        "base ms",
        "with adapters",
        "%",
        "vLLM base",
        "vLLM with",
        "at most",
    ]);
    for row in rows {
        table.add_row([
            row.weights.to_owned(),
            row.batch.to_string(),
            row.adapters.to_string(),
            row.what.to_owned(),
            format!("{:.2}", row.base),
            format!("{:.2}", row.with_adapters),
            format!("{:.1}", (row.with_adapters / row.base - 1.0) * 100.0),
            format!("{:.2}", row.vllm_base),
            format!("{:.2}", row.vllm),
            format!("{:.1}", row.target),
        ]);
    }
    table
}
