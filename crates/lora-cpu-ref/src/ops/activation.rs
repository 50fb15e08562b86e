//! SwiGLU's gate (Shazeer, 2020).

use lora_core::{Result, check};

use crate::inner::{Isa, exp};
use crate::rows::{for_rows, read_row};
use crate::{View, ViewMut};

/// See [`lora_core::Backend::silu_mul`].
pub fn silu_mul(isa: Isa, gate_up: View<'_>, mut out: ViewMut<'_>) -> Result<()> {
    check::silu_mul(gate_up.layout, out.layout)?;
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
