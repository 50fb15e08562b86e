//! Tiles of `vdpbf16ps`: bfloat16 products, two at a time, summed in `f32`.
#![allow(unsafe_code)] // Instructions beyond the build's target, and vectors made of words.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_T1, _mm_prefetch, _mm512_dpbf16_ps, _mm512_set1_epi32,
    _mm512_setzero_ps,
};

use super::super::{Isa, Level};
use super::{Line, Sums, Tile, blocks::Pairs};

/// Prefetch distance in lines: 8 kB, about 0.4 microseconds at the read bandwidth of one core.
const AHEAD: usize = 128;

/// Proof that the CPU has `vdpbf16ps`.
pub(super) struct DotBf16(());

impl DotBf16 {
    /// The tile, if `isa` has the instruction.
    pub(super) fn new(isa: Isa) -> Option<Self> {
        (isa.level() >= Level::Avx512Bf16).then_some(Self(()))
    }
}

impl Tile for DotBf16 {
    type Block = Pairs;

    fn max_rows(&self) -> usize {
        12
    }

    fn max_panels(&self) -> usize {
        2
    }

    fn add(&self, x: &[Pairs], weights: &[&[Line]], sums: &mut [Sums]) {
        match *weights {
            // SAFETY: a `DotBf16` exists only where detection found the instructions.
            [a] => unsafe { add_panels(x, [a], sums) },
            // SAFETY: as above.
            [a, b] => unsafe { add_panels(x, [a, b], sums) },
            _ => {}
        }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn add_panels<const P: usize>(x: &[Pairs], weights: [&[Line]; P], sums: &mut [Sums]) {
    match x.len() {
        1 => add_tile::<1, P>(x, weights, sums),
        2 => add_tile::<2, P>(x, weights, sums),
        3 => add_tile::<3, P>(x, weights, sums),
        4 => add_tile::<4, P>(x, weights, sums),
        5 => add_tile::<5, P>(x, weights, sums),
        6 => add_tile::<6, P>(x, weights, sums),
        7 => add_tile::<7, P>(x, weights, sums),
        8 => add_tile::<8, P>(x, weights, sums),
        9 => add_tile::<9, P>(x, weights, sums),
        10 => add_tile::<10, P>(x, weights, sums),
        11 => add_tile::<11, P>(x, weights, sums),
        12 => add_tile::<12, P>(x, weights, sums),
        _ => {}
    }
}

/// `M` rows by `P` panels; the sums stay in registers throughout.
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_tile<const M: usize, const P: usize>(x: &[Pairs], weights: [&[Line]; P], sums: &mut [Sums]) {
    let Some(x) = x.first_chunk::<M>() else { return };
    let lines = weights.iter().map(|w| w.len()).min().unwrap_or(0).min(x[0].0.len());
    let weights = weights.map(|w| &w[..lines]);
    let mut acc = [[_mm512_setzero_ps(); P]; M];
    for (acc, sum) in acc.as_flattened_mut().iter_mut().zip(sums.iter()) {
        *acc = from_sums(*sum);
    }
    for i in 0..lines {
        let mut w = [pairs(_mm512_set1_epi32(0)); P];
        for p in 0..P {
            w[p] = from_line(weights[p][i]);
            fetch(weights[p], i + AHEAD);
        }
        for m in 0..M {
            let x = pairs(_mm512_set1_epi32(x[m].0[i].cast_signed()));
            for p in 0..P {
                acc[m][p] = _mm512_dpbf16_ps(acc[m][p], w[p], x);
            }
        }
    }
    for (acc, sum) in acc.as_flattened().iter().zip(sums) {
        *sum = to_sums(*acc);
    }
}

/// Prefetches line `index`, which may belong to the next block or panel. A prefetch has no visible effect,
/// so the pointer may even be past the end. The line goes to the L2 cache, since the L1 cache is too small
/// to keep it until it is used.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch(lines: &[Line], index: usize) {
    _mm_prefetch::<_MM_HINT_T1>(lines.as_ptr().wrapping_add(index).cast());
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(words: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes for which every bit pattern is a value.
    unsafe { std::mem::transmute(words) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn from_line(line: Line) -> __m512bh {
    // SAFETY: both are 64 bytes for which every bit pattern is a value.
    unsafe { std::mem::transmute(line) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn from_sums(sums: Sums) -> __m512 {
    // SAFETY: both are 16 `f32`.
    unsafe { std::mem::transmute(sums) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn to_sums(acc: __m512) -> Sums {
    // SAFETY: both are 16 `f32`.
    unsafe { std::mem::transmute(acc) }
}
