//! Checks of norms and of the activation.

use super::{dtype, float, slots::site_kind};
use crate::device::lora::{LoraPlan, SiteKind};
use crate::device::ops::NormWeight;
use crate::device::{Backend, DType, MatLayout, Result, check_extent};

/// Checks the weights of a norm of `rows` rows and `cols` columns.
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`]; [`crate::Error::Unsupported`] for a site of another kind.
pub(super) fn norm_weights<B: Backend>(
    op: &'static str,
    w: &NormWeight<'_, B>,
    [rows, cols]: [usize; 2],
) -> Result<()> {
    let base = w.base.layout;
    dtype(op, "w", base.dtype, DType::F32)?;
    check_extent(op, "rows of w", base.rows, 1)?;
    check_extent(op, "columns of w", base.cols, cols)?;
    let Some((site, plan)) = w.lora else { return Ok(()) };
    site_kind::<B>(op, &site.spec, SiteKind::Norm)?;
    check_extent(op, "columns of adapters' w", site.spec.in_dim, cols)?;
    check_extent(op, "rows of the batch", plan.rows(), rows)
}

/// Checks [`crate::Backend::rms_norm`] and, with the residual among `outs`, [`crate::Backend::add_rms_norm`].
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`].
pub fn norm<B: Backend>(
    op: &'static str,
    x: MatLayout,
    w: &NormWeight<'_, B>,
    outs: &[(&'static str, MatLayout)],
) -> Result<()> {
    float(op, "x", x.dtype)?;
    for (what, out) in outs {
        float(op, what, out.dtype)?;
        check_extent(op, what, out.rows, x.rows)?;
        check_extent(op, what, out.cols, x.cols)?;
    }
    norm_weights(op, w, [x.rows, x.cols])
}

/// Checks [`crate::Backend::silu_mul`].
///
/// # Errors
/// [`crate::Error::DType`], [`crate::Error::Shape`].
pub fn silu_mul(gate_up: MatLayout, out: MatLayout) -> Result<()> {
    const OP: &str = "silu_mul";
    float(OP, "gate_up", gate_up.dtype)?;
    float(OP, "out", out.dtype)?;
    check_extent(OP, "rows of out", out.rows, gate_up.rows)?;
    check_extent(OP, "columns of gate_up", gate_up.cols, 2 * out.cols)
}
