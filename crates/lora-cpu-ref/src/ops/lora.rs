//! LoRA: tables of slots, and the LoRA term of the output of a base layer.

use std::ops::Range;

use lora_core::lora::{LoraSite, SiteKind, SiteSpec, SlotLowRank, SlotRows, SlotSlice};
use lora_core::{Error, HostTensor, Result, check, check_extent};
use rayon::prelude::*;

use super::linear::{input_rows, misfit, pack};
use super::lora_plan::CpuLoraPlan;
use crate::inner::{Isa, Out, Packed, Rows, matmul};
use crate::rows::{RowMut, all_rows, indices};
use crate::{CpuRef, View, ViewMut};

/// The adapters of one site: for each slot, what it does to each slice.
pub struct CpuLoraTable {
    slots: Vec<Vec<Option<CpuSlice>>>,
}

/// One adapter's part of one slice.
struct CpuSlice {
    low_rank: Option<CpuLowRank>,
    gain: Option<Vec<f32>>,
    shift: Option<Vec<f32>>,
    replacement: Option<Packed>,
    rows: Option<CpuRows>,
    /// The weight of a norm, for which the parts above are empty.
    norm_weight: Option<Vec<f32>>,
}

/// An adapter's own rows for some tokens.
struct CpuRows {
    /// Ascending.
    ids: Vec<u32>,
    values: Packed,
}

impl CpuRows {
    /// Which of the rows is that of a token.
    fn find(&self, id: usize) -> Option<usize> {
        u32::try_from(id).ok().and_then(|id| self.ids.binary_search(&id).ok())
    }
}

impl CpuLoraTable {
    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// The weight that a slot's adapter has for a norm, if it has one.
    pub fn norm_weight(&self, slot: usize) -> Option<&[f32]> {
        self.slots.get(slot)?.first()?.as_ref()?.norm_weight.as_deref()
    }
}

/// Factors of the product. An embedding looks columns of `A` up and has no use for packed ones.
struct CpuLowRank {
    a: Factor,
    b: Packed,
    rank: usize,
    scale: f32,
}

enum Factor {
    Packed(Packed),
    Columns(HostTensor),
}

/// See [`lora_core::Backend::lora_table`].
pub fn table(spec: &SiteSpec, slots: usize) -> CpuLoraTable {
    let empty = || spec.slices.iter().map(|_| None).collect();
    CpuLoraTable { slots: (0..slots).map(|_| empty()).collect() }
}

/// See [`lora_core::Backend::write_slot`].
pub fn write_slot(
    site: &mut LoraSite<CpuRef>,
    slot: usize,
    slices: &[Option<SlotSlice>],
) -> Result<()> {
    check::write_slot(&site.spec, site.table.slots.len(), slot, slices)?;
    let built = |slice: &Option<SlotSlice>| {
        slice.as_ref().map(|slice| build(&site.spec, slice)).transpose()
    };
    let built = slices.iter().map(built).collect::<Result<_>>()?;
    site.table.slots[slot] = built;
    Ok(())
}

/// Packs what was checked to fit.
fn build(spec: &SiteSpec, slice: &SlotSlice) -> Result<CpuSlice> {
    let packed = |matrix: &HostTensor| pack("write_slot", std::slice::from_ref(matrix), None);
    let low_rank = |low: &SlotLowRank| {
        let a = match spec.kind {
            SiteKind::Embedding => Factor::Columns(low.a.clone()),
            _ => Factor::Packed(packed(&low.a)?),
        };
        Ok(CpuLowRank { a, b: packed(&low.b)?, rank: low.a.shape()[0], scale: low.scale })
    };
    let rows =
        |rows: &SlotRows| Ok(CpuRows { ids: rows.ids.clone(), values: packed(&rows.values)? });
    let (matrix, norm) = match spec.kind {
        SiteKind::Norm => (None, slice.replacement.as_ref()),
        _ => (slice.replacement.as_ref(), None),
    };
    Ok(CpuSlice {
        low_rank: slice.low_rank.as_ref().map(low_rank).transpose()?,
        gain: slice.gain.clone(),
        shift: slice.shift.clone(),
        replacement: matrix.map(packed).transpose()?,
        rows: slice.rows.as_ref().map(rows).transpose()?,
        norm_weight: norm.map(HostTensor::to_f32),
    })
}

/// See [`lora_core::Backend::lora_add`].
pub fn lora_add(
    isa: Isa,
    x: View<'_>,
    site: &LoraSite<CpuRef>,
    plan: &CpuLoraPlan,
    mut out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "lora_add";
    check::site_output::<CpuRef>(OP, &site.spec, SiteKind::Linear, out.layout)?;
    check::float(OP, "x", x.layout.dtype)?;
    check_extent(OP, "columns of x", x.layout.cols, site.spec.in_dim)?;
    check_extent(OP, "rows of out", out.layout.rows, x.layout.rows)?;
    let tasks = tasks(OP, isa, site, plan, &mut out)?;
    let mut widened = Vec::new();
    let input = input_rows(isa, &x, &mut widened);
    run(tasks, |mut task| {
        let places = std::mem::take(&mut task.places);
        let input = input.listed(&places);
        for (slice, columns) in task.slices.iter().zip(&site.spec.slices) {
            let Some(slice) = slice else { continue };
            let of = |w: &Packed| product(OP, isa, input, w);
            let base = slice.replacement.as_ref().map(of).transpose()?;
            let rows = match &slice.rows {
                Some(rows) => Some((&rows.ids[..], of(&rows.values)?)),
                None => None,
            };
            let width = columns.len();
            let replace = |m: usize, values: &mut [f32]| {
                if let Some(base) = &base {
                    values.copy_from_slice(&base[m * width..(m + 1) * width]);
                }
                if let Some((ids, logits)) = &rows {
                    let logits = &logits[m * ids.len()..];
                    ids.iter().zip(logits).for_each(|(id, logit)| values[*id as usize] = *logit);
                }
            };
            let delta = match &slice.low_rank {
                Some(low) => Some((low.delta(isa, &low.shrink(OP, isa, input)?)?, low.scale)),
                None => None,
            };
            task.store(slice, columns, replace, delta.as_ref());
        }
        Ok(())
    })
}

/// See [`lora_core::Backend::lora_embed`].
pub fn lora_embed(
    isa: Isa,
    ids: View<'_>,
    site: &LoraSite<CpuRef>,
    plan: &CpuLoraPlan,
    mut out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "lora_embed";
    check::site_output::<CpuRef>(OP, &site.spec, SiteKind::Embedding, out.layout)?;
    let ids = indices(OP, "ids", &ids)?;
    check_extent(OP, "rows of out", out.layout.rows, ids.len())?;
    check::ids(OP, "token id", ids, site.spec.in_dim)?;
    let tasks = tasks(OP, isa, site, plan, &mut out)?;
    run(tasks, |mut task| {
        let Some(Some(slice)) = task.slices.first() else { return Ok(()) };
        let ids: Vec<usize> = task.places.iter().map(|row| ids[*row as usize] as usize).collect();
        let replace = |m: usize, values: &mut [f32]| {
            let own = slice.rows.as_ref().and_then(|rows| Some((&rows.values, rows.find(ids[m])?)));
            let table = slice.replacement.as_ref().map(|table| (table, ids[m]));
            if let Some((table, row)) = own.or(table) {
                table.decode_row(row, values);
            }
        };
        let delta = match &slice.low_rank {
            Some(low) => Some((low.delta(isa, &low.look_up(&ids))?, low.scale)),
            None => None,
        };
        let columns = 0..site.spec.out_dim();
        task.store(slice, &columns, replace, delta.as_ref());
        Ok(())
    })
}

/// Some rows of the batch that share an adapter, with what it does at this site.
struct Task<'a> {
    /// Numbers of the rows.
    places: Vec<u32>,
    /// The rows of the output.
    rows: Vec<RowMut<'a>>,
    slices: &'a [Option<CpuSlice>],
}

/// Rows of one task: enough to share the reading of the factors, few enough that the products in
/// f32 stay in a cache.
const TASK_ROWS: usize = 16;

/// Cuts a batch into tasks, checked against site and output.
fn tasks<'a>(
    op: &'static str,
    isa: Isa,
    site: &'a LoraSite<CpuRef>,
    plan: &CpuLoraPlan,
    out: &'a mut ViewMut<'_>,
) -> Result<Vec<Task<'a>>> {
    let limit = out.layout.rows;
    let mut rows = all_rows(isa, out);
    let mut tasks = Vec::new();
    for segment in plan.segments() {
        let slot = check::index(op, "slot", segment.slot, site.table.slots.len())?;
        let slices = &site.table.slots[slot][..];
        for places in segment.rows.chunks(TASK_ROWS) {
            let mut task = Task { places: Vec::new(), rows: Vec::new(), slices };
            for place in places {
                check::index(op, "row", *place as i32, limit)?;
                if let Some(row) = rows.get_mut(*place as usize).and_then(Option::take) {
                    task.places.push(*place);
                    task.rows.push(row);
                }
            }
            tasks.push(task);
        }
    }
    Ok(tasks)
}

/// Runs tasks, in parallel where there are several.
fn run(tasks: Vec<Task<'_>>, f: impl Fn(Task<'_>) -> Result<()> + Send + Sync) -> Result<()> {
    tasks.into_par_iter().try_for_each(f)
}

impl Task<'_> {
    /// `row = gain * (base + scale * delta) + shift` in the given columns. The base is what stands
    /// there, after `replace` had a row's number and its values. Rounds once.
    fn store(
        &mut self,
        slice: &CpuSlice,
        columns: &Range<usize>,
        replace: impl Fn(usize, &mut [f32]),
        delta: Option<&(Vec<f32>, f32)>,
    ) {
        let width = columns.len();
        let mut values = Vec::new();
        for (m, row) in self.rows.iter_mut().enumerate() {
            let mut part = row.slice(columns.clone());
            let at = m * width..(m + 1) * width;
            part.read(&mut values);
            replace(m, &mut values);
            if let Some((delta, scale)) = delta {
                values.iter_mut().zip(&delta[at]).for_each(|(v, d)| *v += scale * d);
            }
            if let Some(gain) = &slice.gain {
                values.iter_mut().zip(gain).for_each(|(v, g)| *v *= g);
            }
            if let Some(shift) = &slice.shift {
                values.iter_mut().zip(shift).for_each(|(v, s)| *v += s);
            }
            part.store(&values);
        }
    }
}

impl CpuLowRank {
    /// `z = A x` of each row: `[rows, rank]`.
    fn shrink(&self, op: &'static str, isa: Isa, x: Rows<'_>) -> Result<Vec<f32>> {
        match &self.a {
            Factor::Packed(a) => product(op, isa, x, a),
            Factor::Columns(_) => Err(Error::Unsupported {
                op,
                backend: crate::NAME,
                what: "the adapter of an embedding; use lora_embed".to_owned(),
            }),
        }
    }

    /// `z = A[:, id]` of each id: `[ids, rank]`.
    fn look_up(&self, ids: &[usize]) -> Vec<f32> {
        let Factor::Columns(a) = &self.a else { return vec![0.0; ids.len() * self.rank] };
        let vocab = a.len() / self.rank.max(1);
        ids.iter().flat_map(|id| (0..self.rank).map(move |j| a.get_f32(j * vocab + id))).collect()
    }

    /// `B z` of each row: `[rows, out]`.
    fn delta(&self, isa: Isa, z: &[f32]) -> Result<Vec<f32>> {
        let rows = z.len() / self.rank.max(1);
        product("lora_add", isa, Rows::f32(z, self.rank, rows), &self.b)
    }
}

/// `x wᵀ` in f32: `[rows, out]`.
fn product(op: &'static str, isa: Isa, x: Rows<'_>, w: &Packed) -> Result<Vec<f32>> {
    let mut values = vec![0.0; x.count() * w.n()];
    matmul(isa, x, w, Out::f32(&mut values, w.n())).map_err(|e| misfit(op, &e))?;
    Ok(values)
}
