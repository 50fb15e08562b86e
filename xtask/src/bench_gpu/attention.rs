//! Prefill attention with Llama-3-8B's heads: FlashInfer's kernel and the crate's own, alternating.

use anyhow::{Context, Result};
use comfy_table::Table;
use lora_core::ops::{AttentionArgs, AttentionRows, HeadDims, KvScales};
use lora_core::{Backend, DType, Pool, Tensor};
use lora_cuda::{Cuda, CudaQueue};
use serde::Serialize;

use super::layer::random;
use crate::median::median;

const DIMS: HeadDims = HeadDims { heads: 32, kv_heads: 8, head_dim: 128 };
const TOKENS_PER_BLOCK: usize = 32;

/// A batch of equal prompts.
#[derive(Clone, Copy)]
struct Case {
    sequences: usize,
    /// Query rows of each sequence in this step.
    rows: usize,
    /// Keys of each sequence: the rows of this step, and those of the prefix before them.
    keys: usize,
}

const fn case(sequences: usize, rows: usize, keys: usize) -> Case {
    Case { sequences, rows, keys }
}

const CASES: [Case; 7] = [
    case(1, 2048, 2048),
    case(2, 1024, 1024),
    case(8, 256, 256),
    case(16, 128, 128),
    case(32, 64, 64),
    case(1, 512, 4096),
    case(1, 8192, 8192),
];

/// Launches in one timed interval.
const LAUNCHES: usize = 8;

/// FLOP/s that large GEMMs reach on an H100; the floor assumes it.
const FLOPS: f64 = 8.0e14;

/// One case and its median times in microseconds.
#[derive(Serialize)]
struct Row {
    sequences: usize,
    rows: usize,
    keys: usize,
    /// The time of the two GEMMs alone at [`FLOPS`].
    floor: f64,
    flashinfer: f64,
    own: f64,
}

/// Measures every case and prints a JSON line for each, then the table.
///
/// # Errors
/// If no GPU is present.
pub fn run(replays: usize) -> Result<()> {
    let cuda = Cuda::new(0)?;
    println!("{}, kernels {}", cuda.device_name(), lora_cuda::kernels::version());
    let mut q = cuda.queue()?;
    let mut table = Table::new();
    table.set_header(["sequences", "rows", "keys", "floor us", "FlashInfer us", "own us", "ratio"]);
    for case in CASES {
        let row = Step::new(&cuda, &mut q, case)?.measure(&cuda, &mut q, replays)?;
        println!("{}", serde_json::to_string(&row)?);
        table.add_row([
            row.sequences.to_string(),
            row.rows.to_string(),
            row.keys.to_string(),
            format!("{:.1}", row.floor),
            format!("{:.1}", row.flashinfer),
            format!("{:.1}", row.own),
            format!("{:.2}", row.flashinfer / row.own),
        ]);
    }
    println!("{table}");
    Ok(())
}

/// A case's plan and operands on the device.
struct Step {
    case: Case,
    plan: <Cuda as Backend>::AttentionPlan,
    queries: Tensor<Cuda>,
    caches: [Tensor<Cuda>; 2],
    sequences: Tensor<Cuda>,
    positions: Tensor<Cuda>,
    tables: Tensor<Cuda>,
    out: Tensor<Cuda>,
}

impl Step {
    fn new(cuda: &Cuda, q: &mut CudaQueue, case: Case) -> Result<Self> {
        let Case { sequences, rows, keys } = case;
        let blocks = keys.div_ceil(TOKENS_PER_BLOCK);
        let mut floats = |rows, cols, seed| -> Result<Tensor<Cuda>> {
            let host = random(rows, cols, seed)?;
            let mut tensor = Tensor::zeros(cuda, Pool::Activations, rows, cols, DType::Bf16)?;
            cuda.upload(q, host.bytes(), tensor.view_mut())?;
            Ok(tensor)
        };
        let cache_rows = sequences * blocks * TOKENS_PER_BLOCK;
        let queries = floats(sequences * rows, DIMS.q_cols(), 1)?;
        let caches =
            [floats(cache_rows, DIMS.kv_cols(), 2)?, floats(cache_rows, DIMS.kv_cols(), 3)?];
        let out = floats(sequences * rows, DIMS.q_cols(), 4)?;
        let mut ints = |rows, values: &[i32]| -> Result<Tensor<Cuda>> {
            let cols = values.len() / rows;
            let mut tensor = Tensor::zeros(cuda, Pool::StepInputs, rows, cols, DType::I32)?;
            cuda.upload(q, bytemuck::cast_slice(values), tensor.view_mut())?;
            Ok(tensor)
        };
        let row = |s: usize| (keys - rows..keys).map(move |p| (s as i32, p as i32));
        let (of_rows, at): (Vec<i32>, Vec<i32>) = (0..sequences).flat_map(row).unzip();
        let table: Vec<i32> = (0..(sequences * blocks) as i32).rev().collect();
        let tensors = (ints(1, &of_rows)?, ints(1, &at)?, ints(sequences, &table)?);
        let mut plan = cuda.attention_plan(DIMS, of_rows.len())?;
        let known = AttentionRows { sequences: &of_rows, positions: &at, table_stride: blocks };
        cuda.plan_attention(q, known, &mut plan)?;
        let (sequences, positions, tables) = tensors;
        Ok(Self { case, plan, queries, caches, sequences, positions, tables, out })
    }

    fn attend(&mut self, cuda: &Cuda, q: &mut CudaQueue, planned: bool) -> lora_core::Result<()> {
        let args = AttentionArgs {
            queries: self.queries.view(),
            dims: DIMS,
            k_cache: self.caches[0].view(),
            v_cache: self.caches[1].view(),
            kv_scales: KvScales::ONE,
            sequence_of_row: self.sequences.view(),
            positions: self.positions.view(),
            block_tables: self.tables.view(),
            tokens_per_block: TOKENS_PER_BLOCK,
            scale: (DIMS.head_dim as f32).sqrt().recip(),
            window: None,
            plan: planned.then_some(&self.plan),
        };
        cuda.attention(q, args, self.out.view_mut())
    }

    fn measure(mut self, cuda: &Cuda, q: &mut CudaQueue, replays: usize) -> Result<Row> {
        let mut times = [Vec::new(), Vec::new()];
        for replay in 0..replays + 3 {
            for (planned, times) in [true, false].into_iter().zip(&mut times) {
                let ms =
                    cuda.time(q, |q| (0..LAUNCHES).try_for_each(|_| self.attend(cuda, q, planned)));
                if replay >= 3 {
                    times.push(f64::from(ms.context("attention")?) * 1e3 / LAUNCHES as f64);
                }
            }
        }
        let [flashinfer, own] = times.map(median);
        let Case { sequences, rows, keys } = self.case;
        // The row at position p attends to p + 1 keys.
        let pairs = sequences * rows * (2 * keys - rows + 1) / 2;
        let floor = (4 * pairs * DIMS.q_cols()) as f64 / FLOPS * 1e6;
        Ok(Row { sequences, rows, keys, floor, flashinfer, own })
    }
}
