//! Adapters: tables of slots, and what they add to the output of a base layer.

use lora_core::lora::{LoraBatch, LoraSite, SiteKind, SiteSpec, SlotLowRank, SlotSlice};
use lora_core::{Error, HostTensor, Result, check_extent};

use super::linear::{Target, input_rows, pack, product};
use crate::inner::{Isa, Out, Packed, Rows, Update, matmul};
use crate::rows::{check_float, checked_index, indices};
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
    const OP: &str = "write_slot";
    checked_index(OP, "slot", slot as i32, site.table.slots.len())?;
    check_extent(OP, "slices", slices.len(), site.spec.slices.len())?;
    let built = slices
        .iter()
        .zip(&site.spec.slices)
        .map(|(slice, columns)| {
            slice.as_ref().map(|slice| build(OP, &site.spec, slice, columns.len())).transpose()
        })
        .collect::<Result<_>>()?;
    site.table.slots[slot] = built;
    Ok(())
}

fn build(op: &'static str, spec: &SiteSpec, slice: &SlotSlice, out: usize) -> Result<CpuSlice> {
    for (what, vector) in [("gain", &slice.gain), ("shift", &slice.shift)] {
        if let Some(vector) = vector {
            check_extent(op, what, vector.len(), out)?;
        }
    }
    let replacement = match &slice.replacement {
        Some(matrix) => {
            let packed = pack(op, std::slice::from_ref(matrix))?;
            let expected = match spec.kind {
                SiteKind::Linear => (out, spec.in_dim),
                SiteKind::Embedding => (spec.in_dim, out),
            };
            check_extent(op, "rows of replacement", packed.n(), expected.0)?;
            check_extent(op, "columns of replacement", packed.k(), expected.1)?;
            Some(packed)
        }
        None => None,
    };
    let low_rank = match &slice.low_rank {
        Some(low) => Some(build_low_rank(op, spec, low, out)?),
        None => None,
    };
    Ok(CpuSlice { low_rank, gain: slice.gain.clone(), shift: slice.shift.clone(), replacement })
}

fn build_low_rank(
    op: &'static str,
    spec: &SiteSpec,
    low: &SlotLowRank,
    out: usize,
) -> Result<CpuLowRank> {
    let [rank, columns] = low.a.shape()[..] else {
        let found = low.a.shape().len();
        return Err(Error::Shape { op, what: "dimensions of a", found, expected: 2 });
    };
    check_float(op, "a", low.a.dtype())?;
    check_extent(op, "columns of a", columns, spec.in_dim)?;
    let b = pack(op, std::slice::from_ref(&low.b))?;
    check_extent(op, "rows of b", b.n(), out)?;
    check_extent(op, "columns of b", b.k(), rank)?;
    let a = match spec.kind {
        SiteKind::Linear => Factor::Packed(pack(op, std::slice::from_ref(&low.a))?),
        SiteKind::Embedding => Factor::Columns(low.a.clone()),
    };
    Ok(CpuLowRank { a, b, rank, scale: low.scale })
}

/// See [`lora_core::Backend::lora_add`].
pub fn lora_add(
    isa: Isa,
    x: View<'_>,
    site: &LoraSite<CpuRef>,
    batch: &LoraBatch<CpuRef>,
    mut out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "lora_add";
    check_float(OP, "x", x.geo.dtype)?;
    check_extent(OP, "columns of x", x.geo.cols, site.spec.in_dim)?;
    check_extent(OP, "rows of out", out.geo.rows, x.geo.rows)?;
    let segments = segments(OP, site, batch, &out)?;
    for Segment { rows, slices } in &segments {
        for (slice, columns) in slices.iter().zip(&site.spec.slices) {
            let Some(slice) = slice else { continue };
            let mut part = cut(&mut out, columns.clone());
            if let Some(matrix) = &slice.replacement {
                let mut widened = Vec::new();
                let input = input_rows(&x, Some(rows), &mut widened);
                let mut target = Target { out: &mut part, rows: Some(rows), update: Update::Store };
                product(OP, isa, input, matrix, &mut target)?;
            }
            if let Some(low) = &slice.low_rank {
                let z = shrink(isa, &x, rows, low)?;
                expand(OP, isa, &z, rows, low, &mut part)?;
            }
            affine(slice, rows, &mut part);
        }
    }
    Ok(())
}

/// See [`lora_core::Backend::lora_embed`].
pub fn lora_embed(
    isa: Isa,
    ids: View<'_>,
    site: &LoraSite<CpuRef>,
    batch: &LoraBatch<CpuRef>,
    mut out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "lora_embed";
    let ids = indices(OP, "ids", &ids)?;
    check_extent(OP, "rows of out", out.geo.rows, ids.len())?;
    for id in ids {
        checked_index(OP, "token id", *id, site.spec.in_dim)?;
    }
    let segments = segments(OP, site, batch, &out)?;
    for Segment { rows, slices } in &segments {
        let Some(Some(slice)) = slices.first() else { continue };
        if let Some(table) = &slice.replacement {
            let mut values = vec![0.0; table.k()];
            for row in rows {
                table.decode_row(ids[*row as usize] as usize, &mut values);
                write_row(&mut out, *row, values.iter().copied());
            }
        }
        if let Some(low) = &slice.low_rank {
            let z = lookup(ids, rows, low);
            expand(OP, isa, &z, rows, low, &mut out)?;
        }
        affine(slice, rows, &mut out);
    }
    Ok(())
}

/// Rows of the batch that share an adapter, with what it does at this site.
struct Segment<'a> {
    rows: Vec<u32>,
    slices: &'a [Option<CpuSlice>],
}

/// The segments of a batch, checked against site and output.
fn segments<'a>(
    op: &'static str,
    site: &'a LoraSite<CpuRef>,
    batch: &LoraBatch<CpuRef>,
    out: &ViewMut<'_>,
) -> Result<Vec<Segment<'a>>> {
    check_float(op, "out", out.geo.dtype)?;
    check_extent(op, "columns of out", out.geo.cols, site.spec.out_dim())?;
    let order = indices(op, "row order", &batch.row_order.view())?.to_vec();
    let starts = indices(op, "segment starts", &batch.starts.view())?.to_vec();
    let slots = indices(op, "slots", &batch.slots.view())?.to_vec();
    (0..batch.segments)
        .map(|i| {
            let slot = checked_index(op, "slot", slots[i], site.table.slots.len())?;
            let (from, to) = (starts[i] as usize, starts[i + 1] as usize);
            let rows = order[from..to]
                .iter()
                .map(|row| checked_index(op, "row", *row, out.geo.rows).map(|row| row as u32))
                .collect::<Result<_>>()?;
            Ok(Segment { rows, slices: &site.table.slots[slot] })
        })
        .collect()
}

fn cut<'a>(out: &'a mut ViewMut<'_>, columns: std::ops::Range<usize>) -> ViewMut<'a> {
    let mut part = out.reborrow();
    part.geo = part.geo.slice_cols(columns);
    part
}

/// `z = A x` of the given rows, in f32: `[rows, rank]`.
fn shrink(isa: Isa, x: &View<'_>, rows: &[u32], low: &CpuLowRank) -> Result<Vec<f32>> {
    let mut z = vec![0.0; rows.len() * low.rank];
    if let Factor::Packed(a) = &low.a {
        let mut widened = Vec::new();
        let input = input_rows(x, Some(rows), &mut widened);
        matmul(isa, input, a, Out::f32(&mut z, low.rank)).map_err(|e| Error::Unsupported {
            op: "lora_add",
            backend: crate::NAME,
            what: e.to_string(),
        })?;
    }
    Ok(z)
}

/// `z = A[:, id]` of the given rows: `[rows, rank]`.
fn lookup(ids: &[i32], rows: &[u32], low: &CpuLowRank) -> Vec<f32> {
    let Factor::Columns(a) = &low.a else { return vec![0.0; rows.len() * low.rank] };
    let vocab = a.len() / low.rank.max(1);
    let place = |row: &u32, j: usize| a.get_f32(j * vocab + ids[*row as usize] as usize);
    rows.iter().flat_map(|row| (0..low.rank).map(move |j| place(row, j))).collect()
}

/// `out += scale * B z` in the given rows.
fn expand(
    op: &'static str,
    isa: Isa,
    z: &[f32],
    rows: &[u32],
    low: &CpuLowRank,
    out: &mut ViewMut<'_>,
) -> Result<()> {
    let mut target = Target { out, rows: Some(rows), update: Update::AddScaled(low.scale) };
    product(op, isa, Rows::f32(z, low.rank, rows.len()), &low.b, &mut target)
}

/// `out = gain * out + shift` in the given rows.
fn affine(slice: &CpuSlice, rows: &[u32], out: &mut ViewMut<'_>) {
    if slice.gain.is_none() && slice.shift.is_none() {
        return;
    }
    let mut values = Vec::new();
    for row in rows {
        crate::rows::read_row(&out.as_view(), *row as usize, &mut values);
        if let Some(gain) = &slice.gain {
            values.iter_mut().zip(gain).for_each(|(v, g)| *v *= g);
        }
        if let Some(shift) = &slice.shift {
            values.iter_mut().zip(shift).for_each(|(v, s)| *v += s);
        }
        write_row(out, *row, values.iter().copied());
    }
}

fn write_row(out: &mut ViewMut<'_>, row: u32, values: impl Iterator<Item = f32>) {
    crate::rows::row_mut(out, row as usize).store(values);
}
