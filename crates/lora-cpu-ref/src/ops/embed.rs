//! Looking rows up.

use lora_core::{DType, Error, Result, check_extent};

use crate::CpuLinear;
use crate::inner::Isa;
use crate::rows::{check_float, checked_index, for_rows, indices, read_row};
use crate::{View, ViewMut};

/// See [`lora_core::Backend::embed`].
pub fn embed(isa: Isa, table: &CpuLinear, ids: View<'_>, mut out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "embed";
    if table.fp8.is_some() {
        let (what, found, allowed) = ("table", DType::F8E4m3, "float32, float16, bfloat16");
        return Err(Error::DType { op: OP, what, found, allowed });
    }
    let table = &table.packed;
    check_float(OP, "out", out.geo.dtype)?;
    let ids = indices(OP, "ids", &ids)?;
    check_extent(OP, "rows of out", out.geo.rows, ids.len())?;
    check_extent(OP, "columns of out", out.geo.cols, table.k())?;
    for id in ids {
        checked_index(OP, "token id", *id, table.n())?;
    }
    for_rows(isa, &mut out, |r, mut row, scratch| {
        scratch.resize(table.k(), 0.0);
        table.decode_row(ids[r] as usize, scratch);
        row.store(scratch);
    });
    Ok(())
}

/// See [`lora_core::Backend::gather_rows`].
pub fn gather_rows(isa: Isa, x: View<'_>, rows: View<'_>, mut out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "gather_rows";
    check_float(OP, "x", x.geo.dtype)?;
    check_float(OP, "out", out.geo.dtype)?;
    let rows = indices(OP, "rows", &rows)?;
    check_extent(OP, "rows of out", out.geo.rows, rows.len())?;
    check_extent(OP, "columns of out", out.geo.cols, x.geo.cols)?;
    for row in rows {
        checked_index(OP, "row", *row, x.geo.rows)?;
    }
    for_rows(isa, &mut out, |r, mut row, scratch| {
        read_row(isa, &x, rows[r] as usize, scratch);
        row.store(scratch);
    });
    Ok(())
}
