//! Root-mean-square norms (Zhang & Sennrich, 2019).

use lora_core::{Result, check};

use crate::inner::{Isa, dot};
use crate::rows::{for_row_pairs, for_rows, read_row, typed_row};
use crate::{View, ViewMut};

/// See [`lora_core::Backend::rms_norm`].
pub fn rms_norm(isa: Isa, x: View<'_>, w: View<'_>, eps: f32, mut out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "rms_norm";
    check::norm(OP, x.geo, w.geo, &[("out", out.geo)])?;
    let w = typed_row::<f32>(&w, 0);
    for_rows(isa, &mut out, |r, mut row, scratch| {
        read_row(isa, &x, r, scratch);
        normalize(isa, scratch, w, eps);
        row.store(scratch);
    });
    Ok(())
}

/// See [`lora_core::Backend::add_rms_norm`].
pub fn add_rms_norm(
    isa: Isa,
    x: View<'_>,
    mut residual: ViewMut<'_>,
    w: View<'_>,
    eps: f32,
    mut out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "add_rms_norm";
    check::norm(OP, x.geo, w.geo, &[("residual", residual.geo), ("out", out.geo)])?;
    let w = typed_row::<f32>(&w, 0);
    for_row_pairs(isa, &mut residual, &mut out, |r, mut residual, mut row, scratch| {
        let mut sum = Vec::with_capacity(x.geo.cols);
        residual.read(&mut sum);
        read_row(isa, &x, r, scratch);
        sum.iter_mut().zip(scratch.iter()).for_each(|(a, b)| *a += b);
        residual.store(&sum);
        // The norm sees what later layers will see: the rounded residual.
        residual.read(&mut sum);
        normalize(isa, &mut sum, w, eps);
        row.store(&sum);
    });
    Ok(())
}

/// `x = x / sqrt(mean(x^2) + eps) * w`.
pub fn normalize(isa: Isa, x: &mut [f32], w: &[f32], eps: f32) {
    let mean_square = dot(isa, x, x) / x.len() as f32;
    let factor = (mean_square + eps).sqrt().recip();
    for (v, w) in x.iter_mut().zip(w) {
        *v = *v * factor * w;
    }
}
