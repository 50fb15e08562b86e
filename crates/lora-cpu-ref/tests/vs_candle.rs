//! Compares the ops in f32 with candle, an independent implementation.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use candle_core::{D, Device, IndexOp, Module, Tensor as Candle};
use lora_core::lora::{LoraSite, SiteSpec, SlotLowRank, SlotSlice};
use lora_core::ops::{AttentionArgs, HeadDims, KvScales, LogprobArgs, LogprobOut, QkvArgs};
use lora_core::{Backend, DType, HostTensor, Pool, Tensor};
use lora_cpu_ref::CpuRef;
use proptest::prelude::*;

const EPS: f32 = 1e-5;

/// `rows * cols` numbers.
#[derive(Clone)]
struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl Matrix {
    /// Numbers in `-1..1` that depend on the seed alone (SplitMix64 of Steele, Lea & Flood, 2014).
    fn random(rows: usize, cols: usize, seed: u64) -> Self {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            (z >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        };
        Self { rows, cols, values: (0..rows * cols).map(|_| next()).collect() }
    }

    fn candle(&self) -> Candle {
        Candle::from_slice(&self.values, (self.rows, self.cols), &Device::Cpu).unwrap()
    }

    fn host(&self) -> HostTensor {
        HostTensor::from_f32(DType::F32, vec![self.rows, self.cols], &self.values).unwrap()
    }

    fn placed(&self, be: &CpuRef) -> Tensor<CpuRef> {
        let mut tensor = zeros(be, self.rows, self.cols, DType::F32);
        be.upload(&mut (), bytemuck::cast_slice(&self.values), tensor.view_mut()).unwrap();
        tensor
    }
}

fn zeros(be: &CpuRef, rows: usize, cols: usize, dtype: DType) -> Tensor<CpuRef> {
    Tensor::zeros(be, Pool::Activations, rows, cols, dtype).unwrap()
}

fn ints(be: &CpuRef, rows: usize, values: &[i32]) -> Tensor<CpuRef> {
    let mut tensor = zeros(be, rows, values.len() / rows, DType::I32);
    be.upload(&mut (), bytemuck::cast_slice(values), tensor.view_mut()).unwrap();
    tensor
}

fn floats(be: &CpuRef, tensor: &Tensor<CpuRef>) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(&be.download(&mut (), tensor.view()).unwrap())
}

/// Checks that two results differ by rounding errors only, in proportion to the largest value.
fn same(found: &[f32], expected: &Candle) -> Result<(), TestCaseError> {
    let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
    prop_assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1f32, |most, v| most.max(v.abs()));
    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
        prop_assert!((a - b).abs() <= 1e-5 * largest, "element {i}: {a} here, {b} in candle");
    }
    Ok(())
}

/// Cosines and sines of the half-dimensions at every position: `[positions, head_dim]`.
fn cos_sin_table(positions: usize, head_dim: usize) -> Matrix {
    let half = head_dim / 2;
    let angle = |p: usize, i: usize| p as f32 * 1e4f32.powf(-(i as f32) / half as f32);
    let row = |p: usize| {
        let cos = (0..half).map(move |i| angle(p, i).cos());
        cos.chain((0..half).map(move |i| angle(p, i).sin()))
    };
    Matrix { rows: positions, cols: head_dim, values: (0..positions).flat_map(row).collect() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn linear_is_candles(rows in 1usize..20, inner in 1usize..150, out in 1usize..80, seed: u64) {
        let (be, x) = (CpuRef::new(), Matrix::random(rows, inner, seed));
        let w = Matrix::random(out, inner, seed ^ 1);
        let bias = Matrix::random(1, out, seed ^ 2);
        let linear = be.prepare_linear(&[w.host()], Some(&bias.values)).unwrap();
        let mut y = zeros(&be, rows, out, DType::F32);
        be.linear(&mut (), x.placed(&be).view(), &linear, y.view_mut()).unwrap();
        let candle = candle_nn::Linear::new(w.candle(), Some(bias.candle().i(0).unwrap()));
        same(&floats(&be, &y), &candle.forward(&x.candle()).unwrap())?;
    }

    #[test]
    fn lora_is_two_products_of_candles(
        rows in 1usize..12, inner in 1usize..80, out in 1usize..80, rank in 1usize..20, seed: u64,
    ) {
        let (be, scale) = (CpuRef::new(), 0.75);
        let [x, y] = [Matrix::random(rows, inner, seed), Matrix::random(rows, out, seed ^ 1)];
        let [a, b] = [Matrix::random(rank, inner, seed ^ 2), Matrix::random(out, rank, seed ^ 3)];
        let spec = SiteSpec::linear(inner, &[out]);
        let table = be.lora_table(&spec, 1).unwrap();
        let mut site = LoraSite { spec, table };
        let low_rank = Some(SlotLowRank { a: a.host(), b: b.host(), scale });
        let slice = SlotSlice { low_rank, ..SlotSlice::default() };
        be.write_slot(&mut (), &mut site, 0, &[Some(slice)]).unwrap();
        let mut plan = be.lora_plan(rows).unwrap();
        be.plan_lora(&mut (), &vec![0; rows], &mut plan).unwrap();
        let mut found = y.placed(&be);
        be.lora_add(&mut (), x.placed(&be).view(), &site, &plan, found.view_mut()).unwrap();

        let z = x.candle().matmul(&a.candle().t().unwrap()).unwrap();
        let delta = z.matmul(&b.candle().t().unwrap()).unwrap();
        let expected = (y.candle() + delta.affine(scale.into(), 0.0).unwrap()).unwrap();
        same(&floats(&be, &found), &expected)?;
    }

    #[test]
    fn norms_are_candles(rows in 1usize..20, cols in 1usize..200, seed: u64) {
        let (be, x) = (CpuRef::new(), Matrix::random(rows, cols, seed));
        let [r, w] = [Matrix::random(rows, cols, seed ^ 1), Matrix::random(1, cols, seed ^ 2)];
        let (mut y, weights) = (zeros(&be, rows, cols, DType::F32), w.placed(&be));
        let candle = |x: &Candle| {
            candle_nn::ops::rms_norm(x, &w.candle().i(0).unwrap(), EPS).unwrap()
        };
        be.rms_norm(&mut (), x.placed(&be).view(), weights.view().into(), EPS, y.view_mut()).unwrap();
        same(&floats(&be, &y), &candle(&x.candle()))?;

        let (x_there, mut sum) = (x.placed(&be), r.placed(&be));
        let (x_view, w_view) = (x_there.view(), weights.view());
        be.add_rms_norm(&mut (), x_view, sum.view_mut(), w_view.into(), EPS, y.view_mut()).unwrap();
        let expected = (x.candle() + r.candle()).unwrap();
        same(&floats(&be, &sum), &expected)?;
        same(&floats(&be, &y), &candle(&expected))?;
    }

    #[test]
    fn the_gate_is_candles(rows in 1usize..20, cols in 1usize..100, seed: u64) {
        let (be, x) = (CpuRef::new(), Matrix::random(rows, 2 * cols, seed));
        let mut y = zeros(&be, rows, cols, DType::F32);
        be.silu_mul(&mut (), x.placed(&be).view(), y.view_mut()).unwrap();
        let gate = x.candle().i((.., ..cols)).unwrap();
        let up = x.candle().i((.., cols..)).unwrap();
        same(&floats(&be, &y), &(candle_nn::ops::silu(&gate).unwrap() * up).unwrap())?;
    }

    #[test]
    fn embedding_is_candles(
        ids in prop::collection::vec(0i32..30, 1..20), cols in 1usize..100, seed: u64,
    ) {
        let (be, table) = (CpuRef::new(), Matrix::random(30, cols, seed));
        let prepared = be.prepare_linear(&[table.host()], None).unwrap();
        let mut y = zeros(&be, ids.len(), cols, DType::F32);
        be.embed(&mut (), &prepared, ints(&be, 1, &ids).view(), y.view_mut()).unwrap();
        let rows: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
        let rows = Candle::new(rows, &Device::Cpu).unwrap();
        let candle = candle_nn::Embedding::new(table.candle(), cols);
        same(&floats(&be, &y), &candle.forward(&rows).unwrap())?;
    }

    #[test]
    fn logprobs_are_candles_log_softmax(rows in 1usize..12, vocab in 1usize..300, seed: u64) {
        let (be, logits) = (CpuRef::new(), Matrix::random(rows, vocab, seed));
        let targets: Vec<i32> = (0..rows).map(|r| ((r * 7919) % vocab) as i32).collect();
        let pair = |dtype| [(1, rows), (rows, vocab)].map(|(r, c)| zeros(&be, r, c, dtype));
        let ([mut target, mut top], [mut rank, mut ids]) = (pair(DType::F32), pair(DType::I32));
        let (placed, there) = (logits.placed(&be), ints(&be, 1, &targets));
        let args = LogprobArgs { logits: placed.view(), targets: there.view() };
        let out = LogprobOut {
            target: target.view_mut(),
            rank: rank.view_mut(),
            top_ids: ids.view_mut(),
            top: top.view_mut(),
        };
        be.logprobs(&mut (), args, out).unwrap();

        let all = candle_nn::ops::log_softmax(&logits.candle(), D::Minus1).unwrap();
        let targets = Candle::new(targets, &Device::Cpu).unwrap();
        let targets = targets.to_dtype(candle_core::DType::U32).unwrap().unsqueeze(1).unwrap();
        same(&floats(&be, &target), &all.gather(&targets, 1).unwrap())?;
        same(&floats(&be, &top), &all.sort_last_dim(false).unwrap().0)?;
    }

    #[test]
    fn rotation_is_candles(rows in 1usize..20, first in 0usize..30, half in 1usize..40, seed: u64) {
        let (be, dims) = (CpuRef::new(), HeadDims { heads: 3, kv_heads: 1, head_dim: 2 * half });
        let qkv = Matrix::random(rows, 5 * dims.head_dim, seed);
        let table = cos_sin_table(64, dims.head_dim);
        let positions: Vec<i32> = (first..first + rows).map(|p| p as i32).collect();
        let slots: Vec<i32> = (0..rows as i32).collect();
        let mut there = qkv.placed(&be);
        let [mut k, mut v] = [(); 2].map(|()| zeros(&be, rows, dims.head_dim, DType::F32));
        let (positions, slots) = (ints(&be, 1, &positions), ints(&be, 1, &slots));
        let cos_sin_table = table.placed(&be);
        let args = QkvArgs {
            qkv: there.view_mut(),
            dims,
            norms: None,
            positions: positions.view(),
            cos_sin_table: cos_sin_table.view(),
            kv_slots: slots.view(),
            k_cache: k.view_mut(),
            v_cache: v.view_mut(),
            kv_scales: KvScales::ONE,
        };
        be.qk_norm_rope_append(&mut (), args).unwrap();

        // `[1, heads, rows, head_dim]` is how candle takes it.
        let heads = qkv.candle().reshape((1, rows, 5, dims.head_dim)).unwrap();
        let heads = heads.transpose(1, 2).unwrap().contiguous().unwrap();
        let part = |from, to| {
            table.candle().i((first..first + rows, from..to)).unwrap().contiguous().unwrap()
        };
        let (cos, sin) = (part(0, half), part(half, 2 * half));
        let turned = candle_nn::rotary_emb::rope(&heads, &cos, &sin).unwrap();
        let q_cols = dims.q_cols();
        let columns = turned.transpose(1, 2).unwrap().flatten_from(2).unwrap();
        let queries = columns.i((0, .., ..q_cols)).unwrap();
        let found: Vec<f32> = floats(&be, &there)
            .chunks_exact(qkv.cols)
            .flat_map(|row| row[..q_cols].to_vec())
            .collect();
        same(&found, &queries)?;
        same(&floats(&be, &k), &turned.i((0, 3)).unwrap())?;
        same(&floats(&be, &v), &heads.i((0, 4)).unwrap())?;
    }

    #[test]
    fn attention_is_candles_softmax_of_products(
        tokens in 1usize..40,
        (group, kv_heads) in (1usize..4, 1usize..3),
        half in 1usize..20,
        seed: u64,
    ) {
        let dims = HeadDims { heads: group * kv_heads, kv_heads, head_dim: 2 * half };
        let be = CpuRef::new();
        let q = Matrix::random(tokens, dims.q_cols(), seed);
        let [k, v] = [1, 2].map(|i| Matrix::random(tokens, dims.kv_cols(), seed ^ i));
        let expected = candle_attention([&q, &k, &v], dims);
        let (table, [k, v]) = (paged_table(tokens), [&k, &v].map(|m| paged(m).placed(&be)));
        let positions: Vec<i32> = (0..tokens as i32).collect();
        let (tables, positions) = (ints(&be, 1, &table), ints(&be, 1, &positions));
        let (q, sequences) = (q.placed(&be), ints(&be, 1, &vec![0; tokens]));
        let args = AttentionArgs {
            queries: q.view(),
            dims,
            k_cache: k.view(),
            v_cache: v.view(),
            kv_scales: KvScales::ONE,
            sequence_of_row: sequences.view(),
            positions: positions.view(),
            block_tables: tables.view(),
            tokens_per_block: BLOCK,
            scale: (dims.head_dim as f32).sqrt().recip(),
            window: None,
            plan: None,
        };
        let mut out = zeros(&be, tokens, dims.q_cols(), DType::F32);
        be.attention(&mut (), args, out.view_mut()).unwrap();
        same(&floats(&be, &out), &expected)?;
    }
}

/// Tokens of a KV block.
const BLOCK: usize = 4;

/// The blocks of a sequence, last block first.
fn paged_table(tokens: usize) -> Vec<i32> {
    (0..tokens.div_ceil(BLOCK) as i32).rev().collect()
}

/// Keys or values in the order of [`paged_table`].
fn paged(matrix: &Matrix) -> Matrix {
    let table = paged_table(matrix.rows);
    let mut cache = Matrix::random(table.len() * BLOCK, matrix.cols, 99);
    for (p, row) in matrix.values.chunks_exact(matrix.cols).enumerate() {
        let place = table[p / BLOCK] as usize * BLOCK + p % BLOCK;
        cache.values[place * matrix.cols..(place + 1) * matrix.cols].copy_from_slice(row);
    }
    cache
}

/// Causal attention of a whole sequence, with keys and values repeated for each head of a group.
fn candle_attention([q, k, v]: [&Matrix; 3], dims: HeadDims) -> Candle {
    let (tokens, group) = (q.rows, dims.heads / dims.kv_heads);
    let heads = |m: &Matrix, heads: usize| {
        let split = m.candle().reshape((tokens, heads, dims.head_dim)).unwrap();
        split.transpose(0, 1).unwrap().contiguous().unwrap()
    };
    let repeated = |m: &Matrix| {
        let rows: Vec<u32> = (0..dims.heads).map(|h| (h / group) as u32).collect();
        let rows = Candle::new(rows, &Device::Cpu).unwrap();
        heads(m, dims.kv_heads).index_select(&rows, 0).unwrap()
    };
    let scores = heads(q, dims.heads).matmul(&repeated(k).transpose(1, 2).unwrap()).unwrap();
    let scores = scores.affine((dims.head_dim as f64).sqrt().recip(), 0.0).unwrap();
    let mask: Vec<f32> = (0..tokens * tokens)
        .map(|i| if i % tokens > i / tokens { f32::NEG_INFINITY } else { 0.0 })
        .collect();
    let mask = Candle::from_vec(mask, (1, tokens, tokens), &Device::Cpu).unwrap();
    let weights =
        candle_nn::ops::softmax(&scores.broadcast_add(&mask).unwrap(), D::Minus1).unwrap();
    let sums = weights.matmul(&repeated(v)).unwrap();
    sums.transpose(0, 1).unwrap().flatten_from(1).unwrap()
}
