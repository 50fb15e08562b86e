//! Checks of LoRA sites and of the slices that are written to their slots.

use super::{dtype, float, index};
use crate::device::lora::{SiteKind, SiteSpec, SlotRows, SlotSlice};
use crate::device::{Backend, DType, Error, HostTensor, MatLayout, Result, check_extent};

/// Checks that a plan made for up to `capacity` rows has room for `rows`.
///
/// # Errors
/// [`crate::Error::Shape`].
pub fn plan_room(op: &'static str, rows: usize, capacity: usize) -> Result<()> {
    if rows <= capacity {
        return Ok(());
    }
    let what = "rows, above what there is room for";
    Err(Error::Shape { op, what, found: rows, expected: capacity })
}

/// Checks [`crate::Backend::write_slot`].
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`], and [`crate::Error::OutOfRange`] for the slot.
pub fn write_slot(
    spec: &SiteSpec,
    slots: usize,
    slot: usize,
    slices: &[Option<SlotSlice>],
) -> Result<()> {
    const OP: &str = "write_slot";
    index(OP, "slot", i32::try_from(slot).unwrap_or(i32::MAX), slots)?;
    check_extent(OP, "slices", slices.len(), spec.slices.len())?;
    for (slice, columns) in slices.iter().zip(&spec.slices) {
        if let Some(slice) = slice {
            slot_slice(OP, spec, slice, columns.len())?;
        }
    }
    Ok(())
}

fn slot_slice(op: &'static str, spec: &SiteSpec, slice: &SlotSlice, out: usize) -> Result<()> {
    if spec.kind == SiteKind::Norm {
        return norm_slice(op, slice, out);
    }
    for (what, vector) in [("gain", &slice.gain), ("shift", &slice.shift)] {
        if let Some(vector) = vector {
            check_extent(op, what, vector.len(), out)?;
        }
    }
    let matrix = |what, tensor: &HostTensor| {
        float(op, what, tensor.dtype())?;
        let found = tensor.shape().len();
        let dims = tensor.matrix_dims().filter(|_| found == 2);
        dims.ok_or(Error::Shape { op, what, found, expected: 2 })
    };
    if let Some(w) = &slice.replacement {
        let (rows, cols) = matrix("replacement", w)?;
        let expected = match spec.kind {
            SiteKind::Embedding => (spec.in_dim, out),
            _ => (out, spec.in_dim),
        };
        check_extent(op, "rows of replacement", rows, expected.0)?;
        check_extent(op, "columns of replacement", cols, expected.1)?;
    }
    if let Some(SlotRows { ids, values }) = &slice.rows {
        let (vocab, width) = match spec.kind {
            SiteKind::Embedding => (spec.in_dim, out),
            _ => (out, spec.in_dim),
        };
        let beside = usize::from(slice.replacement.is_some()) + spec.slices.len() - 1;
        check_extent(op, "slices or replacements beside rows of tokens", beside, 0)?;
        let (rows, cols) = matrix("rows", values)?;
        check_extent(op, "rows of tokens", rows, ids.len())?;
        check_extent(op, "columns of rows of tokens", cols, width)?;
        token_ids(op, ids, vocab)?;
    }
    if let Some(low) = &slice.low_rank {
        let (rank, columns) = matrix("a", &low.a)?;
        check_extent(op, "columns of a", columns, spec.in_dim)?;
        let (rows, ranks) = matrix("b", &low.b)?;
        check_extent(op, "rows of b", rows, out)?;
        check_extent(op, "columns of b", ranks, rank)?;
    }
    Ok(())
}

/// Checks that tokens are ascending and in the vocabulary.
fn token_ids(op: &'static str, ids: &[u32], vocab: usize) -> Result<()> {
    let what = "token";
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
        return Err(Error::OutOfRange { op, what, found: i64::from(*id), limit: vocab });
    }
    match ids.windows(2).find(|pair| pair[0] >= pair[1]) {
        Some(pair) => {
            let (what, found) = ("token after a larger one", pair[1] as usize);
            Err(Error::Shape { op, what, expected: pair[0] as usize + 1, found })
        }
        None => Ok(()),
    }
}

/// Checks the slice of a norm, which may only have a replacement.
fn norm_slice(op: &'static str, slice: &SlotSlice, cols: usize) -> Result<()> {
    let SlotSlice { low_rank, gain, shift, replacement, rows } = slice;
    let others = usize::from(low_rank.is_some())
        + usize::from(rows.is_some())
        + usize::from(gain.is_some())
        + usize::from(shift.is_some());
    check_extent(op, "parts of a norm besides its weight", others, 0)?;
    let Some(weight) = replacement else { return Ok(()) };
    dtype(op, "weight of a norm", weight.dtype(), DType::F32)?;
    check_extent(op, "dimensions of a norm's weight", weight.shape().len(), 1)?;
    check_extent(op, "elements of a norm's weight", weight.len(), cols)
}

pub(super) fn site_kind<B: Backend>(
    op: &'static str,
    spec: &SiteSpec,
    kind: SiteKind,
) -> Result<()> {
    if spec.kind == kind {
        return Ok(());
    }
    let what = format!("a site of kind {:?}", spec.kind);
    Err(Error::Unsupported { op, backend: B::NAME, what })
}

/// Checks that a site is of `kind`, and that `out` fits it.
///
/// # Errors
/// [`crate::Error::Unsupported`] for a site of another kind; [`crate::Error::DType`], [`crate::Error::Shape`].
pub fn site_output<B: Backend>(
    op: &'static str,
    spec: &SiteSpec,
    kind: SiteKind,
    out: MatLayout,
) -> Result<()> {
    site_kind::<B>(op, spec, kind)?;
    float(op, "out", out.dtype)?;
    check_extent(op, "columns of out", out.cols, spec.out_dim())
}
