//! SwiGLU's gate (Shazeer, 2020).

use lora_core::{Result, check_extent};

use crate::rows::{check_float, for_rows, read_row};
use crate::{View, ViewMut};

const OP: &str = "silu_mul";

/// See [`lora_core::Backend::silu_mul`].
pub fn silu_mul(gate_up: View<'_>, mut out: ViewMut<'_>) -> Result<()> {
    check_float(OP, "gate_up", gate_up.geo.dtype)?;
    check_float(OP, "out", out.geo.dtype)?;
    check_extent(OP, "rows of out", out.geo.rows, gate_up.geo.rows)?;
    check_extent(OP, "columns of gate_up", gate_up.geo.cols, 2 * out.geo.cols)?;
    for_rows(&mut out, |r, mut row, scratch| {
        read_row(&gate_up, r, scratch);
        let (gate, up) = scratch.split_at(scratch.len() / 2);
        row.store(gate.iter().zip(up).map(|(g, u)| silu(*g) * u));
    });
    Ok(())
}

/// `x * sigmoid(x)`.
fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}
