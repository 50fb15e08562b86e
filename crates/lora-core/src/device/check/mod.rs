//! Checks of operands that every backend makes before an op starts work.
//!
//! Functions that are named after an op check shapes and dtypes. Those that end in `_ids` check
//! indices (tokens, positions, slots, blocks), wherever a backend has them in host memory.

use super::{DType, Error, MatLayout, Result, check_extent};

mod attention;
mod linear;
mod norm;
mod rows;
mod sample;
mod slots;

pub use attention::{attention, attention_ids, qkv, qkv_ids};
pub use linear::{fp8_parts, linear, row_norms, weight_parts};
pub use norm::{norm, silu_mul};
pub use rows::{copy_rows, embed, gather_rows};
pub use sample::{logprobs, sample, sample_ids};
pub use slots::{plan_room, site_output, write_slot};

/// Checks that an operand holds floats.
///
/// # Errors
/// [`crate::Error::DType`].
pub fn float(op: &'static str, what: &'static str, found: DType) -> Result<()> {
    if found.is_float() {
        return Ok(());
    }
    Err(Error::DType { op, what, found, allowed: "float32, float16, bfloat16" })
}

fn dtype(op: &'static str, what: &'static str, found: DType, wanted: DType) -> Result<()> {
    let allowed = match wanted {
        _ if found == wanted => return Ok(()),
        DType::I32 => "int32",
        _ => "float32",
    };
    Err(Error::DType { op, what, found, allowed })
}

/// Checks that `index` is in `0..limit`, and returns it.
///
/// # Errors
/// [`crate::Error::OutOfRange`].
pub fn index(op: &'static str, what: &'static str, index: i32, limit: usize) -> Result<usize> {
    let found = i64::from(index);
    let inside = usize::try_from(index).ok().filter(|i| *i < limit);
    inside.ok_or(Error::OutOfRange { op, what, found, limit })
}

/// Checks that every index is below `limit`.
///
/// # Errors
/// [`crate::Error::OutOfRange`] with the first that is not.
pub fn ids(op: &'static str, what: &'static str, ids: &[i32], limit: usize) -> Result<()> {
    ids.iter().try_for_each(|id| index(op, what, *id, limit).map(drop))
}

/// Checks that an operand is `[1, n]` i32, and returns `n`.
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`].
pub fn id_row(op: &'static str, what: &'static str, layout: MatLayout) -> Result<usize> {
    dtype(op, what, layout.dtype, DType::I32)?;
    check_extent(op, what, layout.rows, 1)?;
    Ok(layout.cols)
}

/// Checks that a matrix has `host` bytes, and no gaps between its rows.
///
/// # Errors
/// [`crate::Error::Shape`].
pub fn dense_bytes(op: &'static str, layout: MatLayout, host: usize) -> Result<()> {
    if layout.rows > 1 {
        check_extent(op, "row stride", layout.row_stride, layout.cols)?;
    }
    check_extent(op, "bytes on the host", host, layout.rows * layout.cols * layout.dtype.size())
}
