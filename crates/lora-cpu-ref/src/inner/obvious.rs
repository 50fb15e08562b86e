//! The matrix product by its formula, the reference for the fast one.

use super::{
    operand::{Element, Out, Rows, Values, ValuesMut, store},
    packed::Packed,
};

/// See [`matmul_obvious`](super::matmul_obvious), which has checked the operands.
pub(super) fn matmul(x: Rows<'_>, w: &Packed, out: Out<'_>) {
    let at = |m: usize, n| m.saturating_mul(out.stride).saturating_add(n);
    match out.values {
        ValuesMut::Bf16(data) => {
            each_output(x, w, |m, n, y| store(out.bias, n, &[y], one(data, at(m, n))));
        }
        ValuesMut::F32(data) => {
            each_output(x, w, |m, n, y| store(out.bias, n, &[y], one(data, at(m, n))));
        }
    }
}

/// Calls `emit(m, n, y)` for every output.
fn each_output(x: Rows<'_>, w: &Packed, mut emit: impl FnMut(usize, usize, f32)) {
    let mut weights = vec![0.0; w.k()];
    for n in 0..w.n() {
        w.decode_row(n, &mut weights);
        for m in 0..x.count() {
            let y = match x.values {
                Values::Bf16(data) => sum_of_products(x.row(data, m, w.k()), &weights),
                Values::F32(data) => sum_of_products(x.row(data, m, w.k()), &weights),
            };
            emit(m, n, y);
        }
    }
}

fn sum_of_products<T: Element>(x: &[T], w: &[f32]) -> f32 {
    let mut sum = 0.0;
    for (x, w) in x.iter().zip(w) {
        sum += x.widen() * w;
    }
    sum
}

fn one<T>(data: &mut [T], i: usize) -> &mut [T] {
    data.get_mut(i..).and_then(|tail| tail.get_mut(..1)).unwrap_or(&mut [])
}
