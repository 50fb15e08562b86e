//! Products of single vectors, for attention over rows of keys and values.
#![allow(unsafe_code)] // Calls of functions compiled for more than the build's target.

use half::bf16;

use super::{Isa, Level, operand::Element};

/// Partial sums of [`dot`]: four registers of 16 lanes, which hide the latency of an addition.
const LANES: usize = 64;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

/// An element type that [`dot`] and [`axpy`] read: `f32` or [`bf16`].
#[expect(private_bounds, reason = "the conversions are an implementation detail")]
pub trait Vector: Element + sealed::Sealed {}
impl Vector for f32 {}
impl Vector for bf16 {}

/// Sum over i of `a[i] * b[i]`, over the shorter of the two.
///
/// In `f32`: 64 partial sums, of the elements at i, i + 64, ...; then the sums are halved until
/// one is left, upper half onto lower. So the result depends on the length but not on the place.
pub fn dot<T: Vector>(isa: Isa, a: &[f32], b: &[T]) -> f32 {
    match isa.level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` of this level exists only where detection found the instructions.
        Level::Avx512 | Level::Avx512Bf16 => unsafe { dot_avx512(a, b) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { dot_avx2(a, b) },
        _ => dot_lanes(a, b, |x, y, z| x * y + z),
    }
}

/// `y[i] += alpha * x[i]` over the shorter of the two, each rounded by itself in `f32`.
pub fn axpy<T: Vector>(isa: Isa, y: &mut [f32], alpha: f32, x: &[T]) {
    match isa.level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` of this level exists only where detection found the instructions.
        Level::Avx512 | Level::Avx512Bf16 => unsafe { axpy_avx512(y, alpha, x) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { axpy_avx2(y, alpha, x) },
        _ => axpy_with(y, alpha, x, |x, y, z| x * y + z),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn dot_avx512<T: Vector>(a: &[f32], b: &[T]) -> f32 {
    dot_lanes(a, b, f32::mul_add)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn dot_avx2<T: Vector>(a: &[f32], b: &[T]) -> f32 {
    dot_lanes(a, b, f32::mul_add)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn axpy_avx512<T: Vector>(y: &mut [f32], alpha: f32, x: &[T]) {
    axpy_with(y, alpha, x, f32::mul_add);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn axpy_avx2<T: Vector>(y: &mut [f32], alpha: f32, x: &[T]) {
    axpy_with(y, alpha, x, f32::mul_add);
}

#[inline(always)]
fn dot_lanes<T: Vector>(a: &[f32], b: &[T], mul_add: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let shorter = a.len().min(b.len());
    let (a, a_rest) = a[..shorter].as_chunks::<LANES>();
    let (b, b_rest) = b[..shorter].as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] = mul_add(a[lane], b[lane].widen(), sums[lane]);
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum = mul_add(*a, b.widen(), *sum);
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
    }
    sums[0]
}

#[inline(always)]
fn axpy_with<T: Vector>(
    y: &mut [f32],
    alpha: f32,
    x: &[T],
    mul_add: impl Fn(f32, f32, f32) -> f32,
) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = mul_add(alpha, x.widen(), *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn dot_and_axpy_match_plain_sums_at_every_level(
            a in prop::collection::vec(-1.0f32..1.0, 0..300),
            b in prop::collection::vec(-1.0f32..1.0, 0..300),
        ) {
            let halves: Vec<bf16> = b.iter().map(|&v| bf16::from_f32(v)).collect();
            let widened: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
            let expected: f64 = a.iter().zip(&widened).map(|(a, b)| f64::from(a * b)).sum();
            for level in [Level::Baseline, Level::Avx2, Level::Avx512Bf16] {
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
    }
}
