//! Tolerances for comparing results with formulas.

use lora_core::DType;
use proptest::test_runner::{TestCaseError, TestCaseResult};

use super::errors::{self, Largest};
use super::num::Num;
use super::rig::Matrix;

/// Unit roundoff of `f32`, in which ops accumulate.
const F32_ROUNDOFF: f64 = 1.0 / (1u64 << 24) as f64;

/// Numbers below this may be lost: ops may flush subnormal numbers to zero, and divisors may overflow.
const TINY: f64 = 1e-34;

/// Tolerance class of an op. Integers, copies and conversions are compared by [`exact`] instead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// A few operations in `f32`, then one rounding to the output's dtype.
    Rounded,
    /// A sum of so many products in `f32`, in any order, then one rounding.
    Dot(usize),
    /// As [`Class::Dot`], of parts that may have been rounded to this dtype before.
    Through(usize, DType),
    /// As [`Class::Through`], of parts that may be too small for the dtype.
    ThroughEach(usize, DType),
}

impl Class {
    /// The allowed error of an output of `dtype`.
    ///
    /// A sum of k terms has an error of `sqrt(k)` roundings on average and of k in the worst case. In
    /// practice it never reaches four times the average, whereas a missing or duplicate term exceeds that
    /// by far.
    fn bound(self, dtype: DType, expected: Num) -> f64 {
        let (terms, before) = match self {
            Self::Rounded => (0, 0.0),
            Self::Dot(terms) => (terms, 0.0),
            Self::Through(terms, dtype) => (terms, rounding(dtype, expected.size)),
            Self::ThroughEach(terms, dtype) => {
                let lost = 4.0 * (terms as f64).sqrt() * rounding(dtype, 0.0);
                (terms, rounding(dtype, expected.size) + lost)
            }
        };
        let sum = (32.0 + 4.0 * (terms as f64).sqrt()) * F32_ROUNDOFF * expected.size;
        before + sum + rounding(dtype, expected.value.abs() + before + sum)
    }
}

/// The maximum rounding error of numbers up to this magnitude in `dtype`.
fn rounding(dtype: DType, size: f64) -> f64 {
    match dtype {
        DType::F16 => size / 2048.0 + 1.0 / (1u64 << 25) as f64,
        DType::Bf16 => size / 256.0 + TINY,
        DType::F8E4m3 => size / 16.0 + 1.0 / 1024.0,
        _ => size * F32_ROUNDOFF + TINY,
    }
}

/// Compares a result with the expected one, row by row.
///
/// # Errors
/// With the op, the shape, the first bad element and both values.
pub fn close(op: &str, found: &Matrix, expected: &[Num], class: Class) -> TestCaseResult {
    let shape = format!("{op} -> [{}, {}] {}", found.rows, found.cols, found.dtype());
    if expected.len() != found.rows * found.cols {
        return fail(format!("{shape}: {} values expected", expected.len()));
    }
    let mut errors = Largest { comparisons: 1, ..Largest::default() };
    for r in 0..found.rows {
        let expected = &expected[r * found.cols..][..found.cols];
        let largest = expected.iter().map(|wanted| wanted.value.abs()).fold(0.0, f64::max);
        for (c, wanted) in expected.iter().enumerate() {
            let (value, wanted_value) = (f64::from(found.at(r, c)), wanted.value);
            let bound = class.bound(found.dtype(), *wanted);
            // Equal infinities have no difference.
            if value == wanted_value {
                continue;
            }
            let difference = (value - wanted_value).abs();
            let near = difference <= bound;
            if !near {
                return fail(format!(
                    "{shape}: row {r} column {c} is {value:e}, expected {wanted_value:e} +- \
                     {bound:e} ({class:?})"
                ));
            }
            // Of rows that may be lost altogether, only the bound says anything.
            let relative = if largest > TINY { difference / largest } else { 0.0 };
            errors.relative = errors.relative.max(relative);
            errors.of_allowed = errors.of_allowed.max(difference / bound);
        }
    }
    errors::record(op, &found.dtype().to_string(), errors);
    Ok(())
}

/// Checks that a result is bitwise equal to the expected one.
///
/// # Errors
/// With the op, the shape, the first bad element and both values.
pub fn exact(op: &str, found: &Matrix, expected: &Matrix) -> TestCaseResult {
    let shape = format!("{op} -> [{}, {}] {}", found.rows, found.cols, found.dtype());
    if (found.rows, found.cols, found.dtype()) != (expected.rows, expected.cols, expected.dtype()) {
        let (rows, cols, dtype) = (expected.rows, expected.cols, expected.dtype());
        return fail(format!("{shape}: [{rows}, {cols}] {dtype} expected"));
    }
    let (a, b) = (found.data.bytes(), expected.data.bytes());
    let Some(byte) = a.iter().zip(b).position(|(a, b)| a != b) else {
        errors::record_exact(op);
        return Ok(());
    };
    let i = byte / found.dtype().size();
    let (r, c) = (i / found.cols, i % found.cols);
    let (value, wanted) = (found.at(r, c), expected.at(r, c));
    fail(format!("{shape}: row {r} column {c} is {value:e}, expected the bits of {wanted:e}"))
}

fn fail(message: String) -> TestCaseResult {
    Err(TestCaseError::fail(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_element_is_named_with_both_values() {
        let found = Matrix::floats(2, 2, DType::F32, &[1.0, 2.0, 3.0, 4.5]);
        let expected = [1.0, 2.0, 3.0, 4.0].map(Num::of);
        let message = close("op", &found, &expected, Class::Dot(4)).unwrap_err().to_string();
        assert!(message.contains("row 1 column 1 is 4.5e0, expected 4e0"), "{message}");
    }

    #[test]
    fn a_value_that_is_not_a_number_is_never_close() {
        let found = Matrix::floats(1, 1, DType::F32, &[f32::NAN]);
        assert!(close("op", &found, &[Num::of(0.0)], Class::Rounded).is_err());
    }

    #[test]
    fn one_rounding_is_allowed_and_two_are_not() {
        let expected = [Num::of(1.0 + 1.0 / 256.0)];
        for (value, allowed) in [(1.0, true), (1.0 + 1.0 / 128.0, true), (1.0 - 1.0 / 256.0, false)]
        {
            let found = Matrix::floats(1, 1, DType::Bf16, &[value]);
            assert_eq!(close("op", &found, &expected, Class::Rounded).is_ok(), allowed);
        }
    }
}
