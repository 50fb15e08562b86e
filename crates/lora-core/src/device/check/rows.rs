//! Checks of copies, gathers and the embedding.

use std::ops::Range;

use super::{dtype, float, id_row};
use crate::device::{DType, Error, MatLayout, Result, check_extent};

/// Checks [`crate::Backend::copy_rows`].
///
/// # Errors
/// [`crate::Error::Shape`] if rows lie outside of the matrix, or overlap.
pub fn copy_rows(layout: MatLayout, from: &Range<usize>, to: usize) -> Result<()> {
    const OP: &str = "copy_rows";
    let count = from.len();
    let target = to..to.saturating_add(count);
    for rows in [from, &target] {
        if rows.start > rows.end || rows.end > layout.rows {
            let (what, found) = ("end of rows", rows.end);
            return Err(Error::Shape { op: OP, what, expected: layout.rows, found });
        }
    }
    let apart = from.start.abs_diff(to);
    if apart < count {
        let what = "rows between source and target";
        return Err(Error::Shape { op: OP, what, expected: count, found: apart });
    }
    Ok(())
}

/// Checks [`crate::Backend::embed`] from a table `[rows, cols]`.
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`].
pub fn embed(cols: usize, ids: MatLayout, out: MatLayout) -> Result<()> {
    float("embed", "out", out.dtype)?;
    looked_up("embed", cols, ids, out)
}

/// Checks [`crate::Backend::gather_rows`]. Integers are moved as they are.
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`].
pub fn gather_rows(x: MatLayout, rows: MatLayout, out: MatLayout) -> Result<()> {
    const OP: &str = "gather_rows";
    match x.dtype {
        DType::I32 => dtype(OP, "out", out.dtype, DType::I32)?,
        _ => {
            float(OP, "x", x.dtype)?;
            float(OP, "out", out.dtype)?;
        }
    }
    looked_up(OP, x.cols, rows, out)
}

fn looked_up(op: &'static str, cols: usize, ids: MatLayout, out: MatLayout) -> Result<()> {
    check_extent(op, "rows of out", out.rows, id_row(op, "ids", ids)?)?;
    check_extent(op, "columns of out", out.cols, cols)
}
