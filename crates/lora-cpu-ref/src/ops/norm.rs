//! Root-mean-square norms (Zhang & Sennrich, 2019).

use lora_core::ops::NormWeight;
use lora_core::{Result, check};

use super::lora::CpuLoraTable;
use crate::inner::{Isa, dot};
use crate::rows::{for_row_pairs, for_rows, read_row, typed_row};
use crate::{CpuRef, View, ViewMut};

/// See [`lora_core::Backend::rms_norm`].
pub fn rms_norm(
    isa: Isa,
    x: View<'_>,
    w: &NormWeight<'_, CpuRef>,
    eps: f32,
    mut out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "rms_norm";
    check::norm(OP, x.layout, w, &[("out", out.layout)])?;
    let weights = RowWeights::new(OP, w)?;
    for_rows(isa, &mut out, |r, mut row, scratch| {
        read_row(isa, &x, r, scratch);
        normalize(isa, scratch, weights.of(r), eps);
        row.store(scratch);
    });
    Ok(())
}

/// See [`lora_core::Backend::add_rms_norm`].
pub fn add_rms_norm(
    isa: Isa,
    x: View<'_>,
    mut residual: ViewMut<'_>,
    w: &NormWeight<'_, CpuRef>,
    eps: f32,
    mut out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "add_rms_norm";
    check::norm(OP, x.layout, w, &[("residual", residual.layout), ("out", out.layout)])?;
    let weights = RowWeights::new(OP, w)?;
    for_row_pairs(isa, &mut residual, &mut out, |r, mut residual, mut row, scratch| {
        let mut sum = Vec::with_capacity(x.layout.cols);
        residual.read(&mut sum);
        read_row(isa, &x, r, scratch);
        sum.iter_mut().zip(scratch.iter()).for_each(|(a, b)| *a += b);
        residual.store(&sum);
        // The norm reads the rounded residual, as later layers do.
        residual.read(&mut sum);
        normalize(isa, &mut sum, weights.of(r), eps);
        row.store(&sum);
    });
    Ok(())
}

/// The weight of each row: its adapter's, or the base model's.
pub struct RowWeights<'a> {
    base: &'a [f32],
    adapters: Option<(&'a CpuLoraTable, &'a [i32])>,
}

impl<'a> RowWeights<'a> {
    /// Looks up the adapter of each row.
    ///
    /// # Errors
    /// [`lora_core::Error::OutOfRange`] for a slot that the table does not have.
    pub fn new(op: &'static str, w: &NormWeight<'a, CpuRef>) -> Result<Self> {
        let base = typed_row(&w.base, 0);
        let Some((site, plan)) = w.lora else { return Ok(Self { base, adapters: None }) };
        let slots = plan.slot_of_row();
        let used = slots.iter().filter(|slot| **slot >= 0);
        for slot in used {
            check::index(op, "slot", *slot, site.table.slots())?;
        }
        Ok(Self { base, adapters: Some((&site.table, slots)) })
    }

    /// The weight of row `r`.
    pub fn of(&self, r: usize) -> &'a [f32] {
        let own = self.adapters.and_then(|(table, slots)| {
            let slot = usize::try_from(*slots.get(r)?).ok()?;
            table.norm_weight(slot)
        });
        own.unwrap_or(self.base)
    }
}

/// `x = x / sqrt(mean(x^2) + eps) * w`.
pub fn normalize(isa: Isa, x: &mut [f32], w: &[f32], eps: f32) {
    let mean_square = dot(isa, x, x) / x.len() as f32;
    let factor = (mean_square + eps).sqrt().recip();
    for (v, w) in x.iter_mut().zip(w) {
        *v = *v * factor * w;
    }
}
