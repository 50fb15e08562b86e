//! Conversions and exponentials of whole slices, compiled for the instructions of an [`Isa`].

use super::{
    Isa,
    lanes::{Job, Lanes, run},
    operand::Element,
};

/// `out[i] = values[i]`, exact.
pub fn widen<T: Float>(isa: Isa, values: &[T], out: &mut [f32]) {
    run(isa, Widen { values, out });
}

/// `out[i] = values[i]` rounded to nearest, ties to even.
pub fn narrow<T: Float>(isa: Isa, values: &[f32], out: &mut [T]) {
    run(isa, Narrow { values, out });
}

/// `x = exp(x)`, within 2 units in the last place; subnormal results are flushed to zero.
pub fn exp(isa: Isa, values: &mut [f32]) {
    run(isa, Exp { values });
}

/// A float that activations are stored in: `f32`, `bf16` or `f16`.
#[expect(private_bounds, reason = "how elements are converted is no one else's business")]
pub trait Float: Element + bytemuck::Pod {}
impl Float for f32 {}
impl Float for half::bf16 {}
impl Float for half::f16 {}

struct Widen<'a, T> {
    values: &'a [T],
    out: &'a mut [f32],
}

impl<T: Element> Job for Widen<'_, T> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        for (out, value) in self.out.iter_mut().zip(self.values) {
            *out = value.widen();
        }
    }
}

struct Narrow<'a, T> {
    values: &'a [f32],
    out: &'a mut [T],
}

impl<T: Element> Job for Narrow<'_, T> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        for (out, value) in self.out.iter_mut().zip(self.values) {
            *out = T::narrow(*value);
        }
    }
}

struct Exp<'a> {
    values: &'a mut [f32],
}

impl Job for Exp<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        for value in self.values {
            *value = exp_one(*value);
        }
    }
}

/// `2^n * p(r)`, where `x = n ln 2 + r` and p is the Taylor polynomial of degree 7 on `|r| <= ln 2 / 2`. It
/// has no branches and no fused multiply-add, so that every instruction set gives the same bits.
#[inline(always)]
fn exp_one(x: f32) -> f32 {
    /// Adding it rounds to an integer, which is then in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts. The first has trailing zero bits, so that products with small integers are exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const TERMS: [f32; 6] =
        [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 1.0 / 2.0];
    const LARGEST: f32 = 88.722_84;
    const SMALLEST: f32 = -87.336_55;

    let inside = x.clamp(SMALLEST, LARGEST);
    let shifted = inside * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = inside - n * LN2[0] - n * LN2[1];
    let mut p = TERMS[0];
    for term in &TERMS[1..] {
        p = p * r + term;
    }
    let p = p * r * r + r + 1.0;
    // Two factors, as 2^128 is not representable.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let finite = p * power(n >> 1) * power(n - (n >> 1));
    let value = if x > LARGEST {
        f32::INFINITY
    } else if x < SMALLEST {
        0.0
    } else {
        finite
    };
    if x.is_nan() { x } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inner::Level;
    use half::{bf16, f16};
    use proptest::prelude::*;

    const LEVELS: [Level; 4] = [Level::Baseline, Level::Avx2, Level::Avx512, Level::Avx512Bf16];

    fn exp_of(x: f32) -> f32 {
        let mut values = [x];
        exp(Isa::detect(), &mut values);
        values[0]
    }

    #[test]
    fn the_ends_of_the_range_are_right() {
        assert_eq!(exp_of(0.0), 1.0);
        assert_eq!(exp_of(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_of(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_of(89.0), f32::INFINITY);
        assert!(exp_of(f32::NAN).is_nan());
        assert!(exp_of(88.7).is_finite() && exp_of(-87.3) > 0.0);
    }

    proptest! {
        #[test]
        fn exp_is_within_two_units_in_the_last_place(x in -87.0f32..88.0) {
            let (found, expected) = (exp_of(x), f64::from(x).exp());
            let error = (f64::from(found) - expected).abs() / expected;
            prop_assert!(error <= 2.0 * f64::from(f32::EPSILON), "{x}: {found} {expected}");
        }

        #[test]
        fn every_level_gives_the_same_bits(values in prop::collection::vec(-90f32..90.0, 0..70)) {
            let at = |level| {
                let isa = Isa::detect().at_most(level);
                let mut exps = values.clone();
                exp(isa, &mut exps);
                let mut narrow_bf16 = vec![bf16::ZERO; values.len()];
                narrow(isa, &exps, &mut narrow_bf16);
                let mut back = vec![0.0; values.len()];
                widen(isa, &narrow_bf16, &mut back);
                (exps.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), back)
            };
            for level in LEVELS {
                prop_assert_eq!(at(level), at(Level::Baseline));
            }
        }

        #[test]
        fn narrowing_rounds_as_half_does(values in prop::collection::vec(any::<f32>(), 0..40)) {
            let mut out = vec![f16::ZERO; values.len()];
            narrow(Isa::detect(), &values, &mut out);
            for (value, found) in values.iter().zip(out) {
                prop_assert_eq!(found.to_bits(), f16::from_f32(*value).to_bits());
            }
        }
    }
}
