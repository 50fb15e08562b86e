//! Vector products, for attention over rows of keys and values.

use half::bf16;

use super::{
    Isa,
    lanes::{Job, Lanes, run},
    operand::Element,
    packed::LANES,
};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

/// Element type of vector products: `f32` or [`bf16`].
#[expect(private_bounds, reason = "how elements are converted is no one else's business")]
pub trait Vector: Element + sealed::Sealed {}
impl Vector for f32 {}
impl Vector for bf16 {}

/// Sum over i of `a[i] * b[i]`, over the shorter of the two.
///
/// Computed in `f32` with 64 partial sums, of the elements at i, i + 64, ..., which are then reduced by
/// adding the upper half to the lower half. So the result depends only on the values.
pub fn dot<T: Vector>(isa: Isa, a: &[f32], b: &[T]) -> f32 {
    let mut out = [0.0];
    dot_rows(isa, a, b, 0, &mut out);
    out[0]
}

/// `out[i] = dot(a, row i)`, where row `i` is the `a.len()` elements from `i * stride` of `rows`, or as
/// many of them as there are: the scores of a query against the keys of a KV block. Bitwise equal to
/// [`dot`], but faster.
pub fn dot_rows<T: Vector>(isa: Isa, a: &[f32], rows: &[T], stride: usize, out: &mut [f32]) {
    run(isa, DotRows { a, rows, stride, out });
}

/// `y[i] += alpha * x[i]` in `f32`, over the shorter of the two.
pub fn axpy<T: Vector>(isa: Isa, y: &mut [f32], alpha: f32, x: &[T]) {
    axpy_rows(isa, y, &[alpha], x, 0);
}

/// `axpy(y, alphas[i], row i)` for every i in ascending order, where row `i` is the `y.len()` elements from
/// `i * stride` of `rows`, or as many of them as there are: the values of a KV block, weighted by attention.
/// Bitwise equal to [`axpy`], but faster.
pub fn axpy_rows<T: Vector>(isa: Isa, y: &mut [f32], alphas: &[f32], rows: &[T], stride: usize) {
    run(isa, AxpyRows { y, alphas, rows, stride });
}

struct DotRows<'a, T> {
    a: &'a [f32],
    rows: &'a [T],
    stride: usize,
    out: &'a mut [f32],
}

impl<T: Vector> Job for DotRows<'_, T> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        for (i, out) in self.out.iter_mut().enumerate() {
            *out = dot_one::<V, T>(self.a, row(self.rows, i, self.stride));
        }
    }
}

struct AxpyRows<'a, T> {
    y: &'a mut [f32],
    alphas: &'a [f32],
    rows: &'a [T],
    stride: usize,
}

impl<T: Vector> Job for AxpyRows<'_, T> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        for (i, &alpha) in self.alphas.iter().enumerate() {
            axpy_one::<V, T>(self.y, alpha, row(self.rows, i, self.stride));
        }
    }
}

/// All elements from row `i` on.
#[inline(always)]
fn row<T>(rows: &[T], i: usize, stride: usize) -> &[T] {
    rows.get(i.saturating_mul(stride)..).unwrap_or(&[])
}

#[inline(always)]
fn dot_one<V: Lanes, T: Vector>(a: &[f32], b: &[T]) -> f32 {
    let shorter = a.len().min(b.len());
    let (a, a_rest) = a[..shorter].as_chunks::<LANES>();
    let (b, b_rest) = b[..shorter].as_chunks::<LANES>();
    // Four accumulators hide the latency of additions.
    let mut sums = [V::splat(0.0); 4];
    let (a_fours, a_ones) = a.as_chunks::<4>();
    let (b_fours, b_ones) = b.as_chunks::<4>();
    for (a, b) in a_fours.iter().zip(b_fours) {
        for i in 0..4 {
            sums[i] = sums[i].add_product(V::from_array(a[i]), widen(&b[i]));
        }
    }
    let mut next = 0;
    for (a, b) in a_ones.iter().zip(b_ones) {
        sums[next] = sums[next].add_product(V::from_array(*a), widen(b));
        next += 1;
    }
    if !a_rest.is_empty() {
        let (a, b) = (V::from_array(padded(a_rest)), widen(&padded(b_rest)));
        sums[next] = sums[next].add_product(a, b);
    }
    let [s0, s1, s2, s3] = sums;
    s0.add(s2).add(s1.add(s3)).sum()
}

#[inline(always)]
fn axpy_one<V: Lanes, T: Vector>(y: &mut [f32], alpha: f32, x: &[T]) {
    let shorter = y.len().min(x.len());
    let (y, y_rest) = y[..shorter].as_chunks_mut::<LANES>();
    let (x, x_rest) = x[..shorter].as_chunks::<LANES>();
    for (y, x) in y.iter_mut().zip(x) {
        *y = V::from_array(*y).add_product(V::splat(alpha), widen(x)).to_array();
    }
    if !y_rest.is_empty() {
        let sum = V::from_array(padded(y_rest));
        let sum = sum.add_product(V::splat(alpha), widen(&padded(x_rest))).to_array();
        y_rest.copy_from_slice(&sum[..y_rest.len()]);
    }
}

#[inline(always)]
fn widen<V: Lanes, T: Vector>(values: &[T; LANES]) -> V {
    let mut wide = [0.0; LANES];
    for (wide, value) in wide.iter_mut().zip(values) {
        *wide = value.widen();
    }
    V::from_array(wide)
}

/// Up to 16 values, then zeros.
#[inline(always)]
fn padded<T: Vector>(values: &[T]) -> [T; LANES] {
    let mut all = [T::narrow(0.0); LANES];
    for (all, value) in all.iter_mut().zip(values) {
        *all = *value;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;
    use proptest::prelude::*;

    const LEVELS: [Level; 3] = [Level::Baseline, Level::Avx2, Level::Avx512Bf16];

    fn vector() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-1.0f32..1.0, 0..300)
    }

    proptest! {
        #[test]
        fn dot_and_axpy_match_plain_sums_at_every_level(a in vector(), b in vector()) {
            let halves: Vec<bf16> = b.iter().map(|&v| bf16::from_f32(v)).collect();
            let widened: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
            let expected: f64 = a.iter().zip(&widened).map(|(a, b)| f64::from(a * b)).sum();
            for level in LEVELS {
                let isa = Isa::detect().at_most(level);
                let sum = dot(isa, &a, &halves);
                prop_assert!((f64::from(sum) - expected).abs() < 1e-4);
                prop_assert_eq!(sum.to_bits(), dot(isa, &a, &widened).to_bits());
                let mut y = a.clone();
                axpy(isa, &mut y, 0.5, &halves);
                for (i, y) in y.iter().enumerate() {
                    let plain = a[i] + 0.5 * widened.get(i).unwrap_or(&0.0);
                    prop_assert!((y - plain).abs() < 1e-6);
                }
            }
        }

        #[test]
        fn rows_have_the_bits_of_single_calls(
            a in vector(), data in vector(), stride in 0usize..200, count in 0usize..6,
        ) {
            for level in LEVELS {
                let isa = Isa::detect().at_most(level);
                let mut scores = vec![0.0; count];
                dot_rows(isa, &a, &data, stride, &mut scores);
                let (mut all, mut each) = (a.clone(), a.clone());
                axpy_rows(isa, &mut all, &scores, &data, stride);
                for (i, &score) in scores.iter().enumerate() {
                    let row = data.get(i * stride..).unwrap_or(&[]);
                    prop_assert_eq!(score.to_bits(), dot(isa, &a, row).to_bits());
                    axpy(isa, &mut each, score, row);
                }
                prop_assert_eq!(all, each);
            }
        }
    }
}
