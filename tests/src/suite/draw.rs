//! Strategies for shapes of cases, and random numbers for their operands.

use lora_core::DType;
use lora_core::ops::KvScales;
use proptest::prelude::*;

use super::rig::{Gaps, Matrix};

/// A number of rows: none, one, few, and some around multiples of 8, 16 and 32.
pub fn rows() -> impl Strategy<Value = usize> {
    prop_oneof![2 => 0usize..2, 4 => 2usize..12, 2 => prop::sample::select(vec![17usize, 33])]
}

/// A number of columns: small ones, and some around multiples of 16, 32, 64 and 128.
pub fn cols() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 1usize..=40,
        2 => prop::sample::select(vec![48usize, 63, 64, 65, 96, 127, 128, 129, 192, 256, 300]),
    ]
}

/// Gaps around an operand; none in half of the cases.
pub fn gaps() -> impl Strategy<Value = Gaps> {
    let some = (0usize..3, 0usize..9, 0usize..9);
    let some = some.prop_map(|(outer_rows, left, right)| Gaps { outer_rows, left, right });
    prop_oneof![Just(Gaps::default()), some]
}

/// Gaps above and below only, for operands that must be dense.
pub fn outer_rows() -> impl Strategy<Value = Gaps> {
    (0usize..3).prop_map(|outer_rows| Gaps { outer_rows, ..Gaps::default() })
}

/// Scales of a KV cache; none in half of the cases.
pub fn kv_scales() -> impl Strategy<Value = KvScales> {
    let scale = || prop::sample::select(vec![1.0, 0.5, 0.03125, 0.3, 1.7]);
    prop_oneof![Just(KvScales::ONE), (scale(), scale()).prop_map(|(k, v)| KvScales { k, v })]
}

/// Random numbers, the same for a seed on every machine (SplitMix64; Steele, Lea & Flood, 2014).
pub struct Fill(u64);

impl Fill {
    /// Starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit as u64) as usize
    }

    /// A number in `-1..1`; one in sixteen is zero, one in thirty-two eight times as large.
    pub fn value(&mut self) -> f32 {
        let bits = self.bits();
        let value = (bits >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
        match bits % 32 {
            0 | 1 => 0.0,
            2 => 8.0 * value,
            _ => value,
        }
    }

    /// `count` numbers.
    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }

    /// A matrix of numbers.
    pub fn matrix(&mut self, rows: usize, cols: usize, dtype: DType) -> Matrix {
        let values = self.values(rows * cols);
        Matrix::floats(rows, cols, dtype, &values)
    }

    /// `count` ids below `limit`.
    pub fn ids(&mut self, count: usize, limit: usize) -> Vec<i32> {
        (0..count).map(|_| self.below(limit) as i32).collect()
    }

    /// The numbers `0..count` in random order (Fisher and Yates).
    pub fn shuffled(&mut self, count: usize) -> Vec<i32> {
        let mut order: Vec<i32> = (0..count as i32).collect();
        for last in (1..count).rev() {
            order.swap(last, self.below(last + 1));
        }
        order
    }
}
