//! SwiGLU's gate (Shazeer, 2020).

use lora_core::{Result, check_extent};

use crate::inner::{Isa, exp};
use crate::rows::{check_float, for_rows, read_row};
use crate::{View, ViewMut};

const OP: &str = "silu_mul";

/// See [`lora_core::Backend::silu_mul`].
pub fn silu_mul(isa: Isa, gate_up: View<'_>, mut out: ViewMut<'_>) -> Result<()> {
    check_float(OP, "gate_up", gate_up.geo.dtype)?;
    check_float(OP, "out", out.geo.dtype)?;
    check_extent(OP, "rows of out", out.geo.rows, gate_up.geo.rows)?;
    check_extent(OP, "columns of gate_up", gate_up.geo.cols, 2 * out.geo.cols)?;
    for_rows(isa, &mut out, |r, mut row, scratch| {
        read_row(isa, &gate_up, r, scratch);
        let (gate, up) = scratch.split_at_mut(row.len());
        let mut inverse: Vec<f32> = gate.iter().map(|g| -g).collect();
        exp(isa, &mut inverse);
        // silu(g) = g * sigmoid(g) = g / (1 + exp(-g))
        for ((u, g), e) in up.iter_mut().zip(gate).zip(inverse) {
            *u *= *g / (1.0 + e);
        }
        row.store(up);
    });
    Ok(())
}
