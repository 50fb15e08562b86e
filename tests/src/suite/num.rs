//! Expected numbers, with the magnitude that bounds their rounding errors.

use std::iter::Sum;
use std::ops::{Add, Mul, Neg, Sub};

/// An expected number, and the sum of the magnitudes of its terms, to which the rounding error of a sum is
/// proportional (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Num {
    /// The expected number.
    pub value: f64,
    /// Sum of the magnitudes of its terms.
    pub size: f64,
}

impl Num {
    /// A number without cancellation.
    pub fn of(value: f64) -> Self {
        Self { value, size: value.abs() }
    }
}

impl Add for Num {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { value: self.value + other.value, size: self.size + other.size }
    }
}

impl Sub for Num {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl Neg for Num {
    type Output = Self;
    fn neg(self) -> Self {
        Self { value: -self.value, ..self }
    }
}

impl Mul for Num {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        Self { value: self.value * other.value, size: self.size * other.size }
    }
}

impl Mul<f64> for Num {
    type Output = Self;
    fn mul(self, factor: f64) -> Self {
        self * Self::of(factor)
    }
}

impl Sum for Num {
    fn sum<I: Iterator<Item = Self>>(terms: I) -> Self {
        terms.fold(Self::of(0.0), Add::add)
    }
}
