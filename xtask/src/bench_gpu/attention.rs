//! Attention of prompts as Llama-3-8B has it: by FlashInfer's kernel and by the crate's own, in turn.

use anyhow::{Context, Result};
use comfy_table::Table;
use lora_core::ops::{AttentionArgs, AttentionRows, HeadDims, KvScales};
use lora_core::{Backend, DType, Pool, Tensor};
use lora_cuda::{Cuda, CudaQueue};
use serde::Serialize;

use super::layer::random;
use super::median;

const DIMS: HeadDims = HeadDims { heads: 32, kv_heads: 8, head_dim: 128 };
const TOKENS_PER_BLOCK: usize = 32;

/// Sequences, rows of each, and tokens that each has with them.
const CASES: [[usize; 3]; 7] = [
    [1, 2048, 2048],
    [2, 1024, 1024],
    [8, 256, 256],
    [16, 128, 128],
    [32, 64, 64],
    [1, 512, 4096],
    [1, 8192, 8192],
];

/// Launches that are timed together.
const LAUNCHES: usize = 8;

/// Products of an H100's tensor cores in a second, as large ones reach it.
const FLOPS: f64 = 8.0e14;

/// Medians in microseconds.
#[derive(Serialize)]
struct Row {
    sequences: usize,
    rows: usize,
    keys: usize,
    floor: f64,
    flashinfer: f32,
    own: f32,
}

/// Measures every case and prints a JSON line for each, then the table.
///
/// # Errors
/// If there is no GPU.
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

/// Operands of one step.
struct Step {
    case: [usize; 3],
    plan: <Cuda as Backend>::AttentionPlan,
    queries: Tensor<Cuda>,
    caches: [Tensor<Cuda>; 2],
    sequences: Tensor<Cuda>,
    positions: Tensor<Cuda>,
    tables: Tensor<Cuda>,
    out: Tensor<Cuda>,
}

impl Step {
    fn new(cuda: &Cuda, q: &mut CudaQueue, case: [usize; 3]) -> Result<Self> {
        let [sequences, rows, keys] = case;
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
                    times.push(ms.context("attention")? * 1e3 / LAUNCHES as f32);
                }
            }
        }
        let ([flashinfer, own], [sequences, rows, keys]) = (times.map(median), self.case);
        // A row at position p has products with p + 1 keys and as many values.
        let pairs = sequences * rows * (2 * keys - rows + 1) / 2;
        let floor = (4 * pairs * DIMS.q_cols()) as f64 / FLOPS * 1e6;
        Ok(Row { sequences, rows, keys, floor, flashinfer, own })
    }
}
