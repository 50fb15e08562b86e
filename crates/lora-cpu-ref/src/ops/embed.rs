//! Embedding lookup and row gathers.

use lora_core::{DType, Result, check};

use crate::CpuLinear;
use crate::inner::Isa;
use crate::rows::{for_rows, read_row, typed_row};
use crate::{View, ViewMut};

/// See [`lora_core::Backend::embed`].
pub fn embed(isa: Isa, table: &CpuLinear, ids: View<'_>, mut out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "embed";
    if table.fp8.is_some() {
        check::float(OP, "table", DType::F8E4m3)?;
    }
    let table = &table.packed;
    check::embed(table.k(), ids.layout, out.layout)?;
    let ids = typed_row::<i32>(&ids, 0);
    check::ids(OP, "token id", ids, table.n())?;
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
    check::gather_rows(x.layout, rows.layout, out.layout)?;
    let rows = typed_row::<i32>(&rows, 0);
    check::ids(OP, "row", rows, x.layout.rows)?;
    // Integers are copied as bit patterns of f32, without arithmetic.
    for_rows(isa, &mut out, |r, mut row, scratch| {
        read_row(isa, &x, rows[r] as usize, scratch);
        row.store(scratch);
    });
    Ok(())
}
