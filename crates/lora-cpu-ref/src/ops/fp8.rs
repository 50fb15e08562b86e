//! Products with weights in e4m3: input and weights are exact in bf16, in which they are multiplied.

use half::bf16;
use lora_core::fp8::{self, Fp8Scales, InputScale};
use lora_core::{DType, HostTensor, Result, check};

use super::linear::{self, CpuLinear, misfit};
use crate::inner::{Isa, Out, Rows, matmul};
use crate::rows::{for_rows, read_row};
use crate::{View, ViewMut};

/// Scales of a [`CpuLinear`].
pub struct Fp8 {
    /// First output behind each part, and the part's scale.
    parts: Vec<(usize, f32)>,
    input: InputScale,
}

impl Fp8 {
    /// The scale of output `n`.
    pub fn of_output(&self, n: usize) -> f32 {
        self.parts.iter().find(|(end, _)| n < *end).map_or(1.0, |(_, scale)| *scale)
    }
}

/// See [`lora_core::Backend::prepare_fp8_linear`].
pub fn prepare(
    parts: &[HostTensor],
    scales: &Fp8Scales,
    bias: Option<&[f32]>,
) -> Result<CpuLinear> {
    check::fp8_parts(parts, scales, bias)?;
    let widened: Vec<HostTensor> = parts.iter().filter_map(|part| part.cast(DType::Bf16)).collect();
    let mut linear = linear::prepare(&widened, bias)?;
    let ends = parts.iter().scan(0, |end, part| {
        *end += part.shape().first().copied().unwrap_or(0);
        Some(*end)
    });
    let parts = ends.zip(scales.parts.iter().copied()).collect();
    linear.fp8 = Some(Fp8 { parts, input: scales.input });
    Ok(linear)
}

/// `out = x wᵀ + bias` where the shapes are right and there is at least one row.
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

/// The rows divided by their scale and rounded to e4m3, as bf16; and the scales.
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
