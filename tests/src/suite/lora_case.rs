//! Cases of LoRA: sites, adapters and batches.

use lora_core::lora::{LoraSite, SiteKind, SiteSpec, SlotLowRank, SlotRows, SlotSlice};
use lora_core::{Backend, DType};
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::Types;
use super::compare::{Class, close, exact};
use super::draw::{Fill, cols, gaps, rows};
use super::reference::{Input, adapted};
use super::rig::{Gaps, Matrix, Placed, Rig};

/// The parts of an adapter at a slice.
#[derive(Clone, Debug)]
pub struct Parts {
    rank: Option<usize>,
    /// Dtype of B, if it differs from that of A.
    b_dtype: Option<DType>,
    gain: bool,
    shift: bool,
    replacement: bool,
    /// Rows of tokens, only at sites with one slice and without a replacement.
    rows: bool,
}

/// A site, its adapters, and the adapter of each row of a batch.
#[derive(Clone, Debug)]
pub struct Case {
    /// Columns of the input; the vocabulary for an embedding.
    pub in_dim: usize,
    /// Widths of the slices.
    pub widths: Vec<usize>,
    /// The parts at each slice, by slot. The last slot is never written.
    pub adapters: Vec<Vec<Option<Parts>>>,
    /// Slot of each row; -1 is none.
    pub slot_of_row: Vec<i32>,
    /// Gaps around input and output.
    pub gaps: [Gaps; 2],
    /// Random seed.
    pub seed: u64,
}

/// A site in a backend's memory, and the same adapters on the host.
pub struct Site<B: Backend> {
    /// In the backend's memory.
    pub site: LoraSite<B>,
    /// On the host, by slot; empty for a slot that was not written.
    pub slots: Vec<Vec<Option<SlotSlice>>>,
}

fn parts() -> impl Strategy<Value = Parts> {
    let flag = || prop::bool::weighted(0.25);
    let floats = prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]);
    let b_dtype = prop::option::weighted(0.25, floats);
    let rank = prop::option::weighted(0.8, 1usize..=40);
    (rank, b_dtype, flag(), flag(), flag(), flag()).prop_map(
        |(rank, b_dtype, gain, shift, replacement, rows)| Parts {
            rank,
            b_dtype,
            gain,
            shift,
            replacement,
            rows: rows && !replacement,
        },
    )
}

fn with_widths(
    widths: Vec<usize>,
    in_dim: usize,
    rows: impl Strategy<Value = usize>,
) -> impl Strategy<Value = Case> {
    let slice = prop::option::weighted(0.8, parts());
    let adapter = prop::collection::vec(slice, widths.len());
    let adapters = prop::collection::vec(adapter, 1..5);
    (adapters, rows, [gaps(), gaps()], any::<u64>()).prop_flat_map(
        move |(adapters, rows, gaps, seed)| {
            let slots = adapters.len() as i32;
            let widths = widths.clone();
            let any_slots = prop::collection::vec(-1..=slots, rows);
            let slots =
                prop_oneof![6 => any_slots, 1 => Just(vec![-1; rows]), 1 => Just(vec![0; rows])];
            slots.prop_map(move |slot_of_row| Case {
                in_dim,
                widths: widths.clone(),
                adapters: adapters.clone(),
                slot_of_row,
                gaps,
                seed,
            })
        },
    )
}

/// Cases of a projection with one to three slices.
pub fn linear_cases() -> impl Strategy<Value = Case> {
    (prop::collection::vec(cols(), 1..4), cols())
        .prop_flat_map(|(widths, in_dim)| with_widths(widths, in_dim, rows()))
}

/// Cases of a small projection with as many rows as a long prompt has.
pub fn prompt_cases() -> impl Strategy<Value = Case> {
    let widths = prop::collection::vec(1usize..=24, 1..3);
    (widths, prop::sample::select(vec![8usize, 13, 40]))
        .prop_flat_map(|(widths, in_dim)| with_widths(widths, in_dim, 512usize..700))
}

/// Cases of a projection whose dimensions suit tensor cores, with few and many rows, few and many adapters,
/// and all ranks.
pub fn tiled_cases() -> impl Strategy<Value = Case> {
    let adapters = prop_oneof![3 => 1usize..5, 1 => 20usize..24];
    let rows = select(&[1, 7, 8, 9, 33, 64, 65, 130]);
    let ranks = &[1, 2, 7, 8, 16, 16, 17, 64, 255, 256];
    even_cases(even_widths(), even_in_dims(), adapters, rows, ranks, any::<[bool; 2]>())
}

/// Cases with so many rows that other kernels are used, and ranks that those support.
pub fn many_row_cases() -> impl Strategy<Value = Case> {
    many_rows(even_widths(), even_in_dims(), &[8, 16, 24, 48, 256])
}

/// Cases of many rows with long inputs, for which a device may use split-K, with adapters of any kind.
pub fn long_input_cases() -> impl Strategy<Value = Case> {
    let (in_dim, rows) = (select(&[2056, 4096]), select(&[520, 600]));
    even_cases(Just(vec![64]), in_dim, 1usize..5, rows, &[7, 16, 17, 64], any::<[bool; 2]>())
}

/// Cases of a gate and up projection with few rows.
pub fn gated_cases() -> impl Strategy<Value = Case> {
    (cols(), cols()).prop_flat_map(|(width, in_dim)| with_widths(vec![width; 2], in_dim, rows()))
}

/// The same for many rows.
pub fn many_gated_cases() -> impl Strategy<Value = Case> {
    many_gated(&[64, 136, 200], &[8, 64, 136])
}

/// The same for fewer rows without adapters, and many outputs.
pub fn wide_gated_cases() -> impl Strategy<Value = Case> {
    let (widths, in_dim) = (Just(vec![6912; 2]), select(&[8, 72]));
    even_cases(widths, in_dim, 1usize..3, Just(256), &[8], Just([false; 2])).prop_map(|mut case| {
        case.slot_of_row.fill(-1);
        case
    })
}

/// The same with input sizes that e4m3 kernels support.
pub fn many_gated_fp8_cases() -> impl Strategy<Value = Case> {
    many_gated(&[64, 128, 192], &[64, 128])
}

fn many_gated(widths: &'static [usize], in_dims: &'static [usize]) -> impl Strategy<Value = Case> {
    many_rows(select(widths).prop_map(|width| vec![width; 2]), select(in_dims), &[8, 16, 24])
}

/// Cases of chained linear layers, with equal input and output sizes.
pub fn chained_cases() -> impl Strategy<Value = Case> {
    select(&[64, 192, 576]).prop_flat_map(|width| {
        let rows = select(&[1, 3, 8, 17, 64, 130]);
        even_cases(Just(vec![width]), Just(width), 1usize..5, rows, &[8, 16, 64], Just([false; 2]))
    })
}

fn many_rows(
    widths: impl Strategy<Value = Vec<usize>>,
    in_dim: impl Strategy<Value = usize>,
    ranks: &'static [usize],
) -> impl Strategy<Value = Case> {
    let rows = select(&[600, 1536, 1537, 1700, 2050]);
    even_cases(widths, in_dim, 1usize..6, rows, ranks, Just([false; 2])).prop_map(|mut case| {
        // As with prompts, where neighbouring rows mostly have the same adapter.
        if case.seed % 2 == 0 {
            case.slot_of_row.sort_unstable();
        }
        case
    })
}

fn even_widths() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(select(&[64, 128, 192]), 1..=4)
}

fn even_in_dims() -> impl Strategy<Value = usize> {
    select(&[8, 64, 136, 520])
}

fn select(values: &'static [usize]) -> impl Strategy<Value = usize> {
    prop::sample::select(values)
}

/// Cases with dimensions that suit tensor cores.
fn even_cases(
    widths: impl Strategy<Value = Vec<usize>>,
    in_dim: impl Strategy<Value = usize>,
    adapters: impl Strategy<Value = usize>,
    rows: impl Strategy<Value = usize>,
    ranks: &'static [usize],
    gain_and_shift: impl Strategy<Value = [bool; 2]>,
) -> impl Strategy<Value = Case> {
    (widths, in_dim, adapters, rows, gain_and_shift, any::<u64>()).prop_flat_map(
        move |(widths, in_dim, adapters, rows, [gain, shift], seed)| {
            let rank = select(ranks);
            let parts = rank.prop_map(move |rank| {
                Some(Parts {
                    rank: Some(rank),
                    b_dtype: None,
                    gain,
                    shift,
                    replacement: false,
                    rows: false,
                })
            });
            let slice = prop_oneof![5 => parts, 1 => Just(None)];
            let written =
                prop::collection::vec(prop::collection::vec(slice, widths.len()), adapters);
            let slot_of_row = prop::collection::vec(-1..=adapters as i32, rows);
            (written, slot_of_row).prop_map(move |(adapters, slot_of_row)| Case {
                in_dim,
                widths: widths.clone(),
                adapters,
                slot_of_row,
                gaps: Default::default(),
                seed,
            })
        },
    )
}

/// Cases of an embedding.
pub fn embedding_cases() -> impl Strategy<Value = Case> {
    (cols(), 1usize..60).prop_flat_map(|(hidden, vocab)| with_widths(vec![hidden], vocab, rows()))
}

impl Case {
    /// Kind and dimensions of the site.
    pub fn spec(&self, kind: SiteKind) -> SiteSpec {
        match kind {
            SiteKind::Linear => SiteSpec::linear(self.in_dim, &self.widths),
            SiteKind::Embedding => SiteSpec::embedding(self.in_dim, self.widths[0]),
            SiteKind::Norm => SiteSpec::norm(self.in_dim),
        }
    }

    /// The largest rank of its adapters.
    pub fn max_rank(&self) -> usize {
        let slices = self.adapters.iter().flatten().flatten();
        slices.filter_map(|parts| parts.rank).max().unwrap_or(0)
    }

    /// Columns of the output.
    pub fn out_dim(&self) -> usize {
        self.widths.iter().sum()
    }

    /// The site with its adapters written to their slots.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn site<B: Backend>(
        &self,
        rig: &mut Rig<B>,
        kind: SiteKind,
        types: Types,
    ) -> lora_core::Result<Site<B>> {
        let mut fill = Fill::new(self.seed ^ 1);
        let spec = self.spec(kind);
        let table = rig.be.lora_table(&spec, self.adapters.len() + 1)?;
        let mut site = LoraSite { spec, table };
        let mut slots = Vec::new();
        for (slot, adapter) in self.adapters.iter().enumerate() {
            let pairs = adapter.iter().zip(&self.widths);
            let slices: Vec<_> = pairs
                .map(|(parts, width)| {
                    let parts = parts.as_ref().map(|parts| Parts {
                        rows: parts.rows && self.widths.len() == 1,
                        ..parts.clone()
                    });
                    parts.map(|p| p.slice(&mut fill, kind, [self.in_dim, *width], types.w))
                })
                .collect();
            rig.be.write_slot(&mut rig.q, &mut site, slot, &slices)?;
            slots.push(slices);
        }
        slots.push(vec![None; self.widths.len()]);
        Ok(Site { site, slots })
    }

    /// Compares the output `after` with the formula, given the output `before`. Rows and slices that are
    /// not changed by an adapter must have kept their bits.
    ///
    /// # Errors
    /// With the first element that is wrong.
    pub fn check(
        &self,
        what: &str,
        slots: &[Vec<Option<SlotSlice>>],
        kind: SiteKind,
        input: impl Fn(usize) -> Input,
        [before, after]: [&Matrix; 2],
    ) -> TestCaseResult {
        for (r, slot) in self.slot_of_row.iter().enumerate() {
            let mut start = 0;
            for (i, width) in self.widths.iter().enumerate() {
                let columns = start..start + width;
                start += width;
                let [old, new] = [before, after].map(|m| m.cut(r, columns.clone()));
                let slice = usize::try_from(*slot).ok().and_then(|s| slots[s][i].as_ref());
                let what = format!("{what}, row {r} slice {i} slot {slot}");
                match slice.filter(|slice| !is_idle(slice)) {
                    None => exact(&what, &new, &old)?,
                    Some(slice) => {
                        let rank = slice.low_rank.as_ref().map_or(0, |low| low.a.shape()[0]);
                        let terms = self.in_dim + rank;
                        // Rows of tokens may be written before the update is added to them.
                        let class = match slice.rows {
                            Some(_) => Class::Through(terms, new.dtype()),
                            None => Class::Dot(terms),
                        };
                        let expected = adapted(kind, slice, &input(r), &old.nums(0));
                        close(&what, &new, &expected, class)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Whether an adapter does not change a slice.
fn is_idle(slice: &SlotSlice) -> bool {
    let SlotSlice { low_rank, gain, shift, replacement, rows } = slice;
    let update = low_rank.is_some() || gain.is_some() || shift.is_some();
    !update && replacement.is_none() && rows.is_none()
}

/// Which adapter each row uses, in a plan with room for more rows.
///
/// # Errors
/// Those of the backend.
pub fn plan<B: Backend>(rig: &mut Rig<B>, slot_of_row: &[i32]) -> lora_core::Result<B::LoraPlan> {
    let mut plan = rig.be.lora_plan(slot_of_row.len() + 3)?;
    // The contents of an earlier step must not matter.
    rig.be.plan_lora(&mut rig.q, &[0, 1, 0], &mut plan)?;
    rig.be.plan_lora(&mut rig.q, slot_of_row, &mut plan)?;
    Ok(plan)
}

impl Parts {
    fn slice(&self, fill: &mut Fill, kind: SiteKind, dims: [usize; 2], dtype: DType) -> SlotSlice {
        let [in_dim, out] = dims;
        let scale = 2.0 * fill.value() + 0.1;
        let replacement = match kind {
            SiteKind::Embedding => [in_dim, out],
            SiteKind::Linear | SiteKind::Norm => [out, in_dim],
        };
        SlotSlice {
            low_rank: self.rank.map(|rank| SlotLowRank {
                a: fill.matrix(rank, in_dim, dtype).data,
                b: fill.matrix(out, rank, self.b_dtype.unwrap_or(dtype)).data,
                scale,
            }),
            gain: self.gain.then(|| fill.values(out)),
            shift: self.shift.then(|| fill.values(out)),
            replacement: self
                .replacement
                .then(|| fill.matrix(replacement[0], replacement[1], dtype).data),
            rows: self.rows.then(|| token_rows(fill, replacement, dtype)),
        }
    }
}

/// Rows for some, none or all tokens of a matrix `[vocab, width]`.
fn token_rows(fill: &mut Fill, [vocab, width]: [usize; 2], dtype: DType) -> SlotRows {
    let count = fill.below(vocab + 1);
    let mut ids: Vec<u32> = fill.ids(count, vocab).into_iter().map(|id| id as u32).collect();
    ids.sort_unstable();
    ids.dedup();
    let values = fill.matrix(ids.len(), width, dtype).data;
    SlotRows { ids, values }
}

/// Runs `lora_add` on an output, and returns the result.
///
/// # Errors
/// Those of the backend.
pub fn added<B: Backend>(
    rig: &mut Rig<B>,
    site: &LoraSite<B>,
    slot_of_row: &[i32],
    [x, out]: [&Matrix; 2],
    [x_gaps, out_gaps]: [Gaps; 2],
) -> Result<Matrix, TestCaseError> {
    let plan = plan(rig, slot_of_row)?;
    let (x, mut out): (Placed<B>, Placed<B>) = (rig.place(x, x_gaps)?, rig.place(out, out_gaps)?);
    rig.be.lora_add(&mut rig.q, x.view(), site, &plan, out.view_mut())?;
    out.read(rig)
}
