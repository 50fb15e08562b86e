//! Causal attention over paged keys and values.

use lora_core::ops::{AttentionArgs, AttentionRows, HeadDims, KvScales};
use lora_core::{Backend, DType};
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::compare::{Class, close, exact};
use super::draw::{Fill, gaps, kv_scales, outer_rows};
use super::misuse::{Misuse, refusals};
use super::num::Num;
use super::reference::attention;
use super::rig::{Gaps, Matrix, Placed, Rig};
use super::rope::{dims, dims_of};
use super::{Types, for_all};

/// Shape of a step.
#[derive(Clone, Debug)]
struct Case {
    dims: HeadDims,
    /// Tokens of each sequence, and how many of them are rows of this step: one for decoding, more for
    /// prefill.
    sequences: Vec<(usize, usize)>,
    tokens_per_block: usize,
    window: Option<usize>,
    kv_scales: KvScales,
    gaps: Gaps,
    cache_gaps: Gaps,
    /// Whether the step is planned, for which rows must be in the order of their positions.
    planned: bool,
    seed: u64,
}

/// Host operands of a step.
#[derive(Clone)]
struct Operands {
    queries: Matrix,
    sequence_of_row: Vec<i32>,
    positions: Vec<i32>,
    tables: Matrix,
    caches: [Matrix; 2],
}

fn cases() -> impl Strategy<Value = Case> {
    let sequence = prop_oneof![
        6 => (1usize..70).prop_map(|len| (len, 1)),
        1 => (200usize..400).prop_map(|len| (len, 1)),
        2 => (1usize..30).prop_flat_map(|len| (Just(len), 0..=len)),
        1 => (64usize..200).prop_flat_map(|len| (Just(len), 1..=40.min(len))),
    ];
    let sequences = prop::collection::vec(sequence, 0..5);
    let window = prop::option::of(1usize..40);
    cases_of((dims(), sequences, window), kv_scales(), (gaps(), outer_rows()), false)
}

/// Steps with whole prompts, later chunks of prompts, and decoding sequences.
fn planned_cases() -> impl Strategy<Value = Case> {
    let sequence = prop_oneof![
        3 => (32usize..300).prop_map(|len| (len, len)),
        2 => (100usize..400).prop_flat_map(|len| (Just(len), 32..=len / 2)),
        1 => (2usize..40).prop_map(|len| (len, len)),
        2 => (1usize..200).prop_map(|len| (len, 1)),
    ];
    let sequences = prop::collection::vec(sequence, 1..4);
    let window = prop::option::of(prop_oneof![1usize..40, 100usize..200]);
    // Values are mostly unscaled.
    let v = prop_oneof![4 => Just(1.0f32), 1 => Just(0.5)];
    let kv_scales = (prop::sample::select(vec![1.0, 1.7]), v).prop_map(|(k, v)| KvScales { k, v });
    let shape = (dims_of(&[64, 128, 256]), sequences, window);
    cases_of(shape, kv_scales, (outer_rows(), outer_rows()), true)
}

fn cases_of(
    shape: impl Strategy<Value = (HeadDims, Vec<(usize, usize)>, Option<usize>)>,
    kv_scales: impl Strategy<Value = KvScales>,
    gaps: impl Strategy<Value = (Gaps, Gaps)>,
    planned: bool,
) -> impl Strategy<Value = Case> {
    let block = prop::sample::select(vec![1usize, 2, 5, 16, 64]);
    (shape, block, kv_scales, gaps, any::<u64>()).prop_map(
        move |(
            (dims, sequences, window),
            tokens_per_block,
            kv_scales,
            (gaps, cache_gaps),
            seed,
        )| {
            Case {
                dims,
                sequences,
                tokens_per_block,
                window,
                kv_scales,
                gaps,
                cache_gaps,
                planned,
                seed,
            }
        },
    )
}

impl Case {
    fn scale(&self) -> f32 {
        (self.dims.head_dim as f32).sqrt().recip()
    }

    /// KV blocks in random places, with NaN in every cache row that no sequence uses. Rows of different
    /// sequences are interleaved, unless they are planned.
    fn operands(&self, types: Types) -> Operands {
        let mut fill = Fill::new(self.seed);
        let tables = self.tables(&mut fill);
        let cache_rows = (tables.to_ints().len() + 1) * self.tokens_per_block;
        let mut used = vec![false; cache_rows];
        let mut rows = Vec::new();
        for (s, (len, count)) in self.sequences.iter().enumerate() {
            (0..*len).for_each(|p| used[self.place(&tables, s, p)] = true);
            rows.extend((len - count..*len).map(|p| (s as i32, p as i32)));
        }
        if !self.planned {
            let order = fill.shuffled(rows.len());
            rows = order.iter().map(|i| rows[*i as usize]).collect();
        }
        let caches = [(); 2].map(|()| {
            let row = |used: &bool| {
                let values = fill.values(self.dims.kv_cols());
                if *used { values } else { vec![f32::NAN; values.len()] }
            };
            let values: Vec<f32> = used.iter().flat_map(row).collect();
            Matrix::floats(cache_rows, self.dims.kv_cols(), types.kv, &values)
        });
        Operands {
            queries: fill.matrix(rows.len(), self.dims.q_cols(), types.out),
            sequence_of_row: rows.iter().map(|(s, _)| *s).collect(),
            positions: rows.iter().map(|(_, p)| *p).collect(),
            tables,
            caches,
        }
    }

    /// Shuffled blocks for every sequence; entries after its last block are -1.
    fn tables(&self, fill: &mut Fill) -> Matrix {
        let blocks = |len: usize| len.div_ceil(self.tokens_per_block);
        let most = self.sequences.iter().map(|(len, _)| blocks(*len)).max().unwrap_or(0) + 1;
        let mut ids = fill.shuffled(self.sequences.len() * most);
        for (row, (len, _)) in ids.chunks_exact_mut(most).zip(&self.sequences) {
            row[blocks(*len)..].fill(-1);
        }
        Matrix::ints(self.sequences.len(), most, &ids)
    }

    /// Cache row of position `p` of sequence `s`.
    fn place(&self, tables: &Matrix, s: usize, p: usize) -> usize {
        let block = tables.to_ints()[s * tables.cols + p / self.tokens_per_block];
        block as usize * self.tokens_per_block + p % self.tokens_per_block
    }

    /// The expected result of every row.
    fn expected(&self, operands: &Operands) -> Vec<Num> {
        let row = |r: usize| {
            let position = operands.positions[r] as usize;
            let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
            let sequence = operands.sequence_of_row[r] as usize;
            let held = |cache: &Matrix, scale: f32| {
                let scaled = |p| {
                    let row = cache.nums(self.place(&operands.tables, sequence, p));
                    row.into_iter().map(|n| n * f64::from(scale)).collect::<Vec<_>>()
                };
                (first..position + 1).map(scaled).collect::<Vec<_>>()
            };
            let [k, v] = &operands.caches;
            let (keys, values) = (held(k, self.kv_scales.k), held(v, self.kv_scales.v));
            attention(&operands.queries.nums(r), &keys, &values, self.dims, self.scale())
        };
        (0..operands.queries.rows).flat_map(row).collect()
    }
}

/// Runs the op.
fn attended<B: Backend>(
    rig: &mut Rig<B>,
    case: &Case,
    operands: &Operands,
    dtype: DType,
) -> Result<Matrix, TestCaseError> {
    let rows = operands.queries.rows;
    let mut out =
        rig.place(&Fill::new(0).matrix(rows, case.dims.q_cols(), dtype), case.cache_gaps)?;
    let queries = rig.place(&operands.queries, case.gaps)?;
    let [k, v] = &operands.caches;
    let (k, v) = (rig.place(k, case.cache_gaps)?, rig.place(v, case.cache_gaps)?);
    let tables = rig.place(&operands.tables, case.gaps)?;
    let (sequences, positions) =
        (rig.ids(&operands.sequence_of_row)?, rig.ids(&operands.positions)?);
    let mut plan = rig.be.attention_plan(case.dims, rows)?;
    let of_rows = AttentionRows {
        sequences: &operands.sequence_of_row,
        positions: &operands.positions,
        table_stride: tables.view().layout.row_stride,
    };
    rig.be.plan_attention(&mut rig.q, of_rows, &mut plan)?;
    let args = AttentionArgs {
        queries: queries.view(),
        dims: case.dims,
        k_cache: k.view(),
        v_cache: v.view(),
        kv_scales: case.kv_scales,
        sequence_of_row: sequences.view(),
        positions: positions.view(),
        block_tables: tables.view(),
        tokens_per_block: case.tokens_per_block,
        scale: case.scale(),
        window: case.window,
        plan: case.planned.then_some(&plan),
    };
    rig.be.attention(&mut rig.q, args, out.view_mut())?;
    out.read(rig)
}

/// Every row attends to the positions of its sequence up to its own, within the window, through the block
/// table, each group of query heads to its KV head. Nothing else is read.
pub fn attention_is_its_formula<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 160, cases(), is_its_formula(types));
}

/// The same with a plan. A backend that ignores plans is tested with few cases.
pub fn planned_attention_is_its_formula<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let cases = if size_of::<B::AttentionPlan>() == 0 { 4 } else { 96 };
    for_all(make, cases, planned_cases(), is_its_formula(types));
}

fn is_its_formula<B: Backend>(types: Types) -> impl Fn(&mut Rig<B>, &Case) -> TestCaseResult {
    move |rig, case| {
        let operands = case.operands(types);
        let found = attended(rig, case, &operands, types.x)?;
        let longest = case.sequences.iter().map(|(len, _)| *len).max().unwrap_or(0);
        let terms = longest + case.dims.head_dim;
        let class = if rig.be.caps().batch_invariant {
            Class::Dot(terms)
        } else if case.planned {
            // With many keys, weights may be too small for the dtype.
            Class::ThroughEach(terms, types.out)
        } else {
            Class::Through(terms, types.out)
        };
        let op = if case.planned { "planned attention" } else { "attention" };
        close(op, &found, &case.expected(&operands), class)
    }
}

/// A row gets the same bits alone and in a batch.
pub fn a_row_attends_as_if_it_were_alone<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    if !make().caps().batch_invariant {
        return;
    }
    for_all(make, 96, cases(), |rig, case| {
        let batch = case.operands(types);
        let together = attended(rig, case, &batch, types.x)?;
        for r in 0..batch.queries.rows.min(6) {
            let alone = Operands {
                queries: batch.queries.pick(&[r]),
                sequence_of_row: vec![batch.sequence_of_row[r]],
                positions: vec![batch.positions[r]],
                ..batch.clone()
            };
            let found = attended(rig, case, &alone, types.x)?;
            exact("attention of one row", &found, &together.pick(&[r]))?;
        }
        Ok(())
    });
}

/// Valid operands in the backend's memory.
struct Right<B: Backend> {
    queries: Placed<B>,
    caches: [Placed<B>; 2],
    sequences: Placed<B>,
    positions: Placed<B>,
    tables: Placed<B>,
    out: [Placed<B>; 1],
}

const DIMS: HeadDims = HeadDims { heads: 4, kv_heads: 2, head_dim: 4 };

impl<B: Backend> Right<B> {
    fn new(rig: &mut Rig<B>, types: Types) -> lora_core::Result<Self> {
        let (mut fill, none) = (Fill::new(8), Gaps::default());
        Ok(Self {
            queries: rig.place(&fill.matrix(3, 16, types.out), none)?,
            caches: [
                rig.place(&fill.matrix(12, 8, types.kv), none)?,
                rig.place(&fill.matrix(12, 8, types.kv), none)?,
            ],
            sequences: rig.ids(&[0, 1, 1])?,
            positions: rig.ids(&[1, 4, 7])?,
            tables: rig.place(&Matrix::ints(2, 2, &[0, -1, 2, 1]), none)?,
            out: [rig.place(&fill.matrix(3, 16, types.x), none)?],
        })
    }
}

/// Checks that the call is refused after the change `spoil`.
fn refused<B: Backend>(
    m: &mut Misuse<B>,
    right: &mut Right<B>,
    what: &str,
    spoil: fn(&mut AttentionArgs<'_, B>),
) {
    let Right { queries, caches: [k, v], sequences, positions, tables, out } = right;
    m.refused(&format!("attention: {what}"), out, |rig, [out]| {
        let mut args = AttentionArgs {
            queries: queries.view(),
            dims: DIMS,
            k_cache: k.view(),
            v_cache: v.view(),
            kv_scales: KvScales::ONE,
            sequence_of_row: sequences.view(),
            positions: positions.view(),
            block_tables: tables.view(),
            tokens_per_block: 4,
            scale: 0.5,
            window: None,
            plan: None,
        };
        spoil(&mut args);
        rig.be.attention(&mut rig.q, args, out.view_mut())
    });
}

/// A misuse of the op: a description, and the change that makes operands invalid.
type Spoil<B> = (&'static str, fn(&mut AttentionArgs<'_, B>));

/// Wrong shapes and dtypes are errors, and nothing is written.
pub fn attention_refuses_misfits<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let spoils: [Spoil<B>; 15] = [
        ("columns of queries", |a| a.queries.layout = a.queries.layout.slice_cols(0..12)),
        ("rows of queries", |a| a.queries.layout = a.queries.layout.slice_rows(0..2)),
        ("integers for queries", |a| a.queries.layout.dtype = DType::I32),
        ("columns of k_cache", |a| a.k_cache.layout = a.k_cache.layout.slice_cols(0..4)),
        ("columns of v_cache", |a| a.v_cache.layout = a.v_cache.layout.slice_cols(0..4)),
        ("rows of v_cache", |a| a.v_cache.layout = a.v_cache.layout.slice_rows(0..8)),
        ("integers for the caches", |a| {
            a.k_cache.layout.dtype = DType::I32;
            a.v_cache.layout.dtype = DType::I32;
        }),
        ("rows of positions", |a| a.positions.layout = a.positions.layout.slice_cols(0..2)),
        ("dtype of positions", |a| a.positions.layout.dtype = DType::F32),
        ("rows of sequence_of_row", |a| {
            a.sequence_of_row.layout = a.sequence_of_row.layout.slice_cols(0..2);
        }),
        ("dtype of block_tables", |a| a.block_tables.layout.dtype = DType::F32),
        ("no tokens in a block", |a| a.tokens_per_block = 0),
        ("no KV heads", |a| {
            a.dims.kv_heads = 0;
            a.k_cache.layout = a.k_cache.layout.slice_cols(0..0);
            a.v_cache.layout = a.v_cache.layout.slice_cols(0..0);
        }),
        ("heads that KV heads do not divide", |a| {
            a.dims.kv_heads = 3;
            a.k_cache.layout.cols = 12;
            a.v_cache.layout.cols = 12;
        }),
        ("a window without a token", |a| a.window = Some(0)),
    ];
    refusals(make, |m| {
        let mut right = Right::new(&mut m.rig, types)?;
        for (what, spoil) in spoils {
            refused(m, &mut right, what, spoil);
        }
        Ok(())
    });
}

/// Sequences, positions and blocks out of range are errors, and nothing is written.
pub fn attention_refuses_ids_out_of_range<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    refusals(make, |m| {
        for bad in [2, -1, i32::MIN] {
            let mut right = Right::new(&mut m.rig, types)?;
            right.sequences = m.rig.ids(&[0, 1, bad])?;
            refused(m, &mut right, &format!("sequence {bad} of 2"), |_| {});
        }
        for bad in [8, -1, i32::MAX] {
            let mut right = Right::new(&mut m.rig, types)?;
            right.positions = m.rig.ids(&[1, 4, bad])?;
            refused(m, &mut right, &format!("position {bad} of 8"), |_| {});
        }
        for bad in [3, -1, i32::MAX] {
            let mut right = Right::new(&mut m.rig, types)?;
            let table = Matrix::ints(2, 2, &[0, -1, 2, bad]);
            right.tables = m.rig.place(&table, Gaps::default())?;
            refused(m, &mut right, &format!("KV block {bad} of 3"), |_| {});
        }
        Ok(())
    });
}
