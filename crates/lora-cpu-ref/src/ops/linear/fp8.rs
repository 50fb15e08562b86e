//! Linear layers with e4m3 weights. e4m3 values are exact in bf16, in which they are multiplied.

use half::bf16;
use lora_core::Result;
use lora_core::fp8::{self, InputScale};

use super::weights::{CpuLinear, Fp8, misfit};
use crate::inner::{Isa, Out, Rows, matmul};
use crate::rows::{for_rows, read_row};
use crate::{View, ViewMut};

/// `out = x wᵀ + bias`, for checked operands with at least one row.
pub fn product(
    isa: Isa,
    x: View<'_>,
    w: &CpuLinear,
    scales: &Fp8,
    mut out: ViewMut<'_>,
) -> Result<()> {
    let (k, n) = (w.packed.k(), w.packed.n());
    let (codes, of_rows) = round_rows(isa, &x, scales.input);
    let mut products = vec![0.0; of_rows.len() * n];
    matmul(isa, Rows::bf16(&codes, k, of_rows.len()), &w.packed, Out::f32(&mut products, n))
        .map_err(|e| misfit("linear", &e))?;
    for_rows(isa, &mut out, |r, mut row, scratch| {
        scratch.clear();
        let mut start = 0;
        for (end, of_part) in &scales.parts {
            let products = &products[r * n + start..r * n + end];
            scratch.extend(products.iter().map(|value| value * (of_rows[r] * of_part)));
            start = *end;
        }
        if let Some(bias) = &w.bias {
            scratch.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
        }
        row.store(scratch);
    });
    Ok(())
}

/// The rows divided by their scales and rounded to e4m3, as bf16, and the scales.
fn round_rows(isa: Isa, x: &View<'_>, input: InputScale) -> (Vec<bf16>, Vec<f32>) {
    let mut codes = Vec::with_capacity(x.layout.rows * x.layout.cols);
    let mut row = Vec::new();
    let of_row = |r| {
        read_row(isa, x, r, &mut row);
        let scale = match input {
            InputScale::Static(scale) => scale,
            InputScale::Dynamic => fp8::scale_of(row.iter().copied()),
        };
        let rounded = row.iter().map(|v| fp8::decode(fp8::encode(v / scale)));
        codes.extend(rounded.map(bf16::from_f32));
        scale
    };
    let scales = (0..x.layout.rows).map(of_row).collect();
    (codes, scales)
}
