//! Sixteen `f32` in the registers of each instruction set.
#![allow(unsafe_code)] // Instructions beyond the build target.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m512, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_movehl_ps, _mm_shuffle_ps,
    _mm256_add_ps, _mm256_castps256_ps128, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_set1_ps,
    _mm512_add_ps, _mm512_fmadd_ps, _mm512_set1_ps,
};

use super::{Isa, Level, packed::LANES};

/// Sixteen sums or factors. Types beyond the build target are used only in [`run`], which inlines the work
/// into functions that are compiled for their instructions.
pub(super) trait Lanes: Copy {
    /// Maximum rows of a tile, so that its sums fit in registers with some left for weights.
    const ROWS: usize;
    fn from_array(values: [f32; LANES]) -> Self;
    fn to_array(self) -> [f32; LANES];
    fn splat(value: f32) -> Self;
    fn add(self, other: Self) -> Self;
    /// `self + x * w`, lane by lane.
    fn add_product(self, x: Self, w: Self) -> Self;
    /// The sum of all lanes, reduced by adding the upper half to the lower half.
    fn sum(self) -> f32;
}

/// Generic work that is compiled for every instruction set.
pub(super) trait Job {
    /// Does the work. It must be `#[inline(always)]`, like everything that its inner loops call.
    fn run<V: Lanes>(self);
}

/// Does `job` with the instructions of `isa`.
pub(super) fn run(isa: Isa, job: impl Job) {
    match isa.level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` of this level exists only where detection found the instructions.
        Level::Avx512 | Level::Avx512Bf16 => unsafe { run_avx512(job) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { run_avx2(job) },
        _ => job.run::<Plain>(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn run_avx512(job: impl Job) {
    job.run::<Avx512>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2(job: impl Job) {
    job.run::<Avx2>();
}

/// Any CPU. Products are rounded before they are added, as a fused multiply-add without the instruction is
/// a slow library call.
#[derive(Clone, Copy)]
struct Plain([f32; LANES]);

impl Lanes for Plain {
    const ROWS: usize = 2;

    #[inline(always)]
    fn from_array(values: [f32; LANES]) -> Self {
        Self(values)
    }

    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        self.0
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    fn add(mut self, other: Self) -> Self {
        for (sum, other) in self.0.iter_mut().zip(other.0) {
            *sum += other;
        }
        self
    }

    #[inline(always)]
    fn add_product(mut self, x: Self, w: Self) -> Self {
        for ((sum, x), w) in self.0.iter_mut().zip(x.0).zip(w.0) {
            *sum += x * w;
        }
        self
    }

    #[inline(always)]
    fn sum(mut self) -> f32 {
        for half in [8, 4, 2, 1] {
            let (low, high) = self.0.split_at_mut(half);
            low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
        }
        self.0[0]
    }
}

/// AVX2 with fused multiply-add.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Avx2([__m256; 2]);

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx2 {
    const ROWS: usize = 6;

    #[inline(always)]
    fn from_array(values: [f32; LANES]) -> Self {
        // SAFETY: both are 16 `f32`.
        Self(unsafe { std::mem::transmute::<[f32; LANES], [__m256; 2]>(values) })
    }

    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        // SAFETY: both are 16 `f32`.
        unsafe { std::mem::transmute(self.0) }
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: see `Lanes`; this holds for every call below.
        Self([unsafe { _mm256_set1_ps(value) }; 2])
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.0, other.0);
        // SAFETY: see `Lanes`.
        Self(unsafe { [_mm256_add_ps(a, c), _mm256_add_ps(b, d)] })
    }

    #[inline(always)]
    fn add_product(self, x: Self, w: Self) -> Self {
        let [low, high] = self.0;
        // SAFETY: see `Lanes`.
        Self(unsafe {
            [_mm256_fmadd_ps(x.0[0], w.0[0], low), _mm256_fmadd_ps(x.0[1], w.0[1], high)]
        })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let [low, high] = self.0;
        // SAFETY: see `Lanes`.
        unsafe {
            let eight = _mm256_add_ps(low, high);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
}

/// AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Avx512(__m512);

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx512 {
    const ROWS: usize = 12;

    #[inline(always)]
    fn from_array(values: [f32; LANES]) -> Self {
        // SAFETY: both are 16 `f32`.
        Self(unsafe { std::mem::transmute::<[f32; LANES], __m512>(values) })
    }

    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        // SAFETY: both are 16 `f32`.
        unsafe { std::mem::transmute(self.0) }
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: see `Lanes`; this holds for every call below.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: see `Lanes`.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn add_product(self, x: Self, w: Self) -> Self {
        // SAFETY: see `Lanes`.
        Self(unsafe { _mm512_fmadd_ps(x.0, w.0, self.0) })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: both are 16 `f32`; a CPU with AVX-512 F has AVX2.
        Avx2(unsafe { std::mem::transmute::<__m512, [__m256; 2]>(self.0) }).sum()
    }
}
