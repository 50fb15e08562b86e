//! Linear layers.

use bytemuck::Pod;
use half::bf16;
use lora_core::ops::HostUpdate;
use lora_core::{DType, Result, check};

use crate::inner::{Isa, Out, Rows, dot, matmul};
use crate::rows::{for_rows, read_row};
use crate::{View, ViewMut};

mod fp8;
mod weights;

pub use weights::{CpuLinear, misfit, pack, prepare, prepare_fp8};

/// See [`lora_core::Backend::linear`].
pub fn linear(isa: Isa, x: View<'_>, w: &CpuLinear, mut out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "linear";
    check::linear(x.layout, [w.packed.n(), w.packed.k()], out.layout)?;
    if x.layout.rows == 0 {
        return Ok(());
    }
    if let Some(scales) = &w.fp8 {
        return fp8::product(isa, x, w, scales, out);
    }
    let bias = w.bias.as_deref();
    let mut widened = Vec::new();
    let rows = input_rows(isa, &x, &mut widened);
    let (start, stride) = (out.layout.offset, out.layout.row_stride);
    let product =
        |out: Out<'_>| matmul(isa, rows, &w.packed, out.bias(bias)).map_err(|e| misfit(OP, &e));
    match out.layout.dtype {
        DType::Bf16 => product(Out::bf16(&mut out.buf.as_mut_slice::<bf16>()[start..], stride)),
        DType::F16 => {
            let n = w.packed.n();
            let mut values = vec![0.0; rows.count() * n];
            product(Out::f32(&mut values, n))?;
            for_rows(isa, &mut out, |r, mut row, _| row.store(&values[r * n..(r + 1) * n]));
            Ok(())
        }
        _ => product(Out::f32(&mut out.buf.as_mut_slice::<f32>()[start..], stride)),
    }
}

/// Rows of a view as input of the inner product. For f16, which it does not support, they are converted into
/// `widened`.
pub fn input_rows<'a>(isa: Isa, x: &View<'a>, widened: &'a mut Vec<f32>) -> Rows<'a> {
    fn from_first<'a, T: Pod>(x: &View<'a>) -> &'a [T] {
        // A view without rows may start beyond the end of its buffer.
        x.buf.as_slice().get(x.layout.offset..).unwrap_or(&[])
    }
    let layout = x.layout;
    match layout.dtype {
        DType::Bf16 => Rows::bf16(from_first(x), layout.row_stride, layout.rows),
        DType::F32 => Rows::f32(from_first(x), layout.row_stride, layout.rows),
        _ => {
            let mut row = Vec::new();
            for r in 0..layout.rows {
                read_row(isa, x, r, &mut row);
                widened.extend_from_slice(&row);
            }
            Rows::f32(widened, layout.cols, layout.rows)
        }
    }
}

/// See [`lora_core::Backend::row_norms`].
pub fn row_norms(
    isa: Isa,
    w: &CpuLinear,
    rows: std::ops::Range<usize>,
    HostUpdate { a, b, scale }: HostUpdate<'_>,
) -> Result<Vec<f32>> {
    let k = w.packed.k();
    let rank = check::row_norms([w.packed.n(), k], &rows, a, b)?;
    let (a, b) = (a.to_f32(), b.to_f32());
    let mut row = vec![0.0; k];
    Ok(rows
        .enumerate()
        .map(|(i, n)| {
            w.packed.decode_row(n, &mut row);
            if let Some(fp8) = &w.fp8 {
                let scale = fp8.of_output(n);
                row.iter_mut().for_each(|value| *value *= scale);
            }
            for (j, factor) in b[i * rank..(i + 1) * rank].iter().enumerate() {
                crate::inner::axpy(isa, &mut row, scale * factor, &a[j * k..(j + 1) * k]);
            }
            dot(isa, &row, &row).sqrt()
        })
        .collect())
}
