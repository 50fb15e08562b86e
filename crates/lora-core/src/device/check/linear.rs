//! Checks of linear layers.

use std::ops::Range;

use super::float;
use crate::device::fp8::Fp8Scales;
use crate::device::{DType, Error, HostTensor, MatLayout, Result, check_extent};

/// Checks [`crate::Backend::linear`] with a weight matrix `[n, k]`.
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`].
pub fn linear(x: MatLayout, [n, k]: [usize; 2], out: MatLayout) -> Result<()> {
    const OP: &str = "linear";
    float(OP, "x", x.dtype)?;
    float(OP, "out", out.dtype)?;
    check_extent(OP, "columns of x", x.cols, k)?;
    check_extent(OP, "columns of out", out.cols, n)?;
    check_extent(OP, "rows of out", out.rows, x.rows)
}

/// Checks the parts of a weight matrix, stacked by rows, and returns its `[n, k]`.
///
/// # Errors
/// [`crate::Error::Shape`]; [`crate::Error::DType`] if parts differ in dtype or `allow` refuses it.
pub fn weight_parts(
    op: &'static str,
    parts: &[HostTensor],
    bias: Option<&[f32]>,
    allow: impl Fn(DType) -> Result<()>,
) -> Result<[usize; 2]> {
    let (mut n, mut k) = (0, None);
    for part in parts {
        let [rows, cols] = part.shape()[..] else {
            let (what, found) = ("number of dimensions", part.shape().len());
            return Err(Error::Shape { op, what, found, expected: 2 });
        };
        allow(part.dtype())?;
        check_extent(op, "columns of a part", cols, *k.get_or_insert(cols))?;
        n += rows;
    }
    let first = parts.first().map(HostTensor::dtype);
    if let Some(other) = parts.iter().map(HostTensor::dtype).find(|d| Some(*d) != first) {
        let allowed = "the dtype of the first part";
        return Err(Error::DType { op, what: "weight", found: other, allowed });
    }
    if let Some(bias) = bias {
        check_extent(op, "bias", bias.len(), n)?;
    }
    Ok([n, k.unwrap_or(0)])
}

/// Checks [`crate::Backend::prepare_fp8_linear`], and returns the `[n, k]` of the matrix.
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`].
pub fn fp8_parts(
    parts: &[HostTensor],
    scales: &Fp8Scales,
    bias: Option<&[f32]>,
) -> Result<[usize; 2]> {
    const OP: &str = "prepare_fp8_linear";
    check_extent(OP, "scales", scales.parts.len(), parts.len())?;
    weight_parts(OP, parts, bias, |found| match found {
        DType::F8E4m3 => Ok(()),
        _ => Err(Error::DType { op: OP, what: "weight", found, allowed: "float8_e4m3fn" }),
    })
}

/// Checks [`crate::Backend::row_norms`] of `rows` of a matrix `[n, k]`, and returns the rank.
///
/// # Errors
/// [`crate::Error::Shape`], [`crate::Error::OutOfRange`].
pub fn row_norms(
    [n, k]: [usize; 2],
    rows: &Range<usize>,
    a: &HostTensor,
    b: &HostTensor,
) -> Result<usize> {
    const OP: &str = "row_norms";
    let [rank, cols] = a.shape()[..] else {
        let found = a.shape().len();
        return Err(Error::Shape { op: OP, what: "dimensions of a", found, expected: 2 });
    };
    check_extent(OP, "columns of a", cols, k)?;
    check_extent(OP, "elements of b", b.len(), rows.len() * rank)?;
    if rows.end > n {
        let (found, limit) = (rows.end as i64, n + 1);
        return Err(Error::OutOfRange { op: OP, what: "row", found, limit });
    }
    Ok(rank)
}
