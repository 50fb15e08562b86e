//! Tiles in plain `f32` arithmetic, compiled once for each instruction set.
#![allow(unsafe_code)] // Calls of functions compiled for more than the build's target.

use super::super::{
    Isa, Level,
    float16::{bf16_to_f32, f16_to_f32},
    packed::Dtype,
};
use super::{LANES, Line, Sums, Tile, blocks::Singles};

/// Weights of one type times `f32`, with the instructions of one level.
pub(super) struct Fma {
    isa: Isa,
    dtype: Dtype,
}

impl Fma {
    /// The tile for weights of `dtype` under `isa`.
    pub(super) fn new(isa: Isa, dtype: Dtype) -> Self {
        Self { isa, dtype }
    }

    fn wide(&self) -> bool {
        self.isa.level() >= Level::Avx512
    }
}

impl Tile for Fma {
    type Block = Singles;

    /// As many as leave registers for weights: of 32 with 16 lanes, 16 with 8 or 16 with 4.
    fn max_rows(&self) -> usize {
        match self.isa.level() {
            Level::Baseline => 2,
            Level::Avx2 => 6,
            Level::Avx512 | Level::Avx512Bf16 => 12,
        }
    }

    fn panels(&self) -> usize {
        if self.wide() { 2 } else { 1 }
    }

    fn add(&self, x: &[Singles], weights: &[&[Line]], sums: &mut [Sums]) {
        match self.dtype {
            Dtype::Bf16 => by_level::<Bf16>(self.isa, x, weights, sums),
            Dtype::F16 => by_level::<F16>(self.isa, x, weights, sums),
            Dtype::F32 => by_level::<F32>(self.isa, x, weights, sums),
        }
    }
}

/// How the words of a line hold weights.
trait Decode {
    /// Weights in a word: values of k in a line.
    const DEPTH: usize;
    /// Weight `index` of `word`.
    fn weight(word: u32, index: usize) -> f32;
}

struct Bf16;
struct F16;
struct F32;

impl Decode for Bf16 {
    const DEPTH: usize = Dtype::Bf16.depth();

    #[inline(always)]
    fn weight(word: u32, index: usize) -> f32 {
        if index == 0 { bf16_to_f32(word) } else { f32::from_bits(word & 0xffff_0000) }
    }
}

impl Decode for F16 {
    const DEPTH: usize = Dtype::F16.depth();

    #[inline(always)]
    fn weight(word: u32, index: usize) -> f32 {
        f16_to_f32(if index == 0 { word & 0xffff } else { word >> 16 })
    }
}

impl Decode for F32 {
    const DEPTH: usize = Dtype::F32.depth();

    #[inline(always)]
    fn weight(word: u32, _index: usize) -> f32 {
        f32::from_bits(word)
    }
}

/// How a product joins a sum: `a * b + c`.
trait MulAdd {
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// Rounded once, where the CPU has the instruction.
struct Fused;
/// Rounded twice: without the instruction, a fused one would be a slow library call.
struct Separate;

impl MulAdd for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl MulAdd for Separate {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

fn by_level<D: Decode>(isa: Isa, x: &[Singles], weights: &[&[Line]], sums: &mut [Sums]) {
    match (isa.level(), weights) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` of this level exists only where detection found the instructions.
        (Level::Avx512 | Level::Avx512Bf16, &[a, b]) => unsafe { avx512::<D, 2>(x, [a, b], sums) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        (Level::Avx512 | Level::Avx512Bf16, &[a]) => unsafe { avx512::<D, 1>(x, [a], sums) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        (Level::Avx2, &[a]) => unsafe { avx2::<D>(x, [a], sums) },
        (_, &[a]) => baseline::<D>(x, [a], sums),
        _ => {}
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512<D: Decode, const P: usize>(x: &[Singles], weights: [&[Line]; P], sums: &mut [Sums]) {
    match x.len() {
        1 => add_tile::<D, Fused, 1, P>(x, weights, sums),
        2 => add_tile::<D, Fused, 2, P>(x, weights, sums),
        3 => add_tile::<D, Fused, 3, P>(x, weights, sums),
        4 => add_tile::<D, Fused, 4, P>(x, weights, sums),
        5 => add_tile::<D, Fused, 5, P>(x, weights, sums),
        6 => add_tile::<D, Fused, 6, P>(x, weights, sums),
        7 => add_tile::<D, Fused, 7, P>(x, weights, sums),
        8 => add_tile::<D, Fused, 8, P>(x, weights, sums),
        9 => add_tile::<D, Fused, 9, P>(x, weights, sums),
        10 => add_tile::<D, Fused, 10, P>(x, weights, sums),
        11 => add_tile::<D, Fused, 11, P>(x, weights, sums),
        12 => add_tile::<D, Fused, 12, P>(x, weights, sums),
        _ => {}
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<D: Decode>(x: &[Singles], weights: [&[Line]; 1], sums: &mut [Sums]) {
    match x.len() {
        1 => add_tile::<D, Fused, 1, 1>(x, weights, sums),
        2 => add_tile::<D, Fused, 2, 1>(x, weights, sums),
        3 => add_tile::<D, Fused, 3, 1>(x, weights, sums),
        4 => add_tile::<D, Fused, 4, 1>(x, weights, sums),
        5 => add_tile::<D, Fused, 5, 1>(x, weights, sums),
        6 => add_tile::<D, Fused, 6, 1>(x, weights, sums),
        _ => {}
    }
}

fn baseline<D: Decode>(x: &[Singles], weights: [&[Line]; 1], sums: &mut [Sums]) {
    match x.len() {
        1 => add_tile::<D, Separate, 1, 1>(x, weights, sums),
        2 => add_tile::<D, Separate, 2, 1>(x, weights, sums),
        _ => {}
    }
}

/// `M` rows by `P` panels; written so that the sums can stay in vector registers.
#[inline(always)]
fn add_tile<D: Decode, F: MulAdd, const M: usize, const P: usize>(
    x: &[Singles],
    weights: [&[Line]; P],
    sums: &mut [Sums],
) {
    let Some(x) = x.first_chunk::<M>() else { return };
    let lines = weights.iter().map(|w| w.len()).min().unwrap_or(0).min(x[0].0.len() / D::DEPTH);
    let weights = weights.map(|w| &w[..lines]);
    let mut acc = [[[0.0f32; LANES]; P]; M];
    for (acc, sum) in acc.as_flattened_mut().iter_mut().zip(sums.iter()) {
        *acc = sum.0;
    }
    for i in 0..lines {
        for d in 0..D::DEPTH {
            for p in 0..P {
                let w = weights[p][i].0.map(|word| D::weight(word, d));
                for m in 0..M {
                    let x = x[m].0[i * D::DEPTH + d];
                    for l in 0..LANES {
                        acc[m][p][l] = F::mul_add(x, w[l], acc[m][p][l]);
                    }
                }
            }
        }
    }
    for (acc, sum) in acc.as_flattened().iter().zip(sums) {
        sum.0 = *acc;
    }
}
