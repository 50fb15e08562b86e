//! Tiles in `f32` arithmetic, compiled for each instruction set.

use std::marker::PhantomData;

use super::super::{
    Isa, Level,
    dtype::Dtype,
    float16::{bf16_to_f32, f16_to_f32},
    lanes::{Job, Lanes, run},
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
}

impl Tile for Fma {
    type Block = Singles;

    fn max_rows(&self) -> usize {
        12
    }

    fn max_panels(&self) -> usize {
        if self.isa.level() >= Level::Avx512 { 2 } else { 1 }
    }

    fn add(&self, x: &[Singles], weights: &[&[Line]], sums: &mut [Sums]) {
        match self.dtype {
            Dtype::Bf16 => self.add_decoded::<Bf16>(x, weights, sums),
            Dtype::F16 => self.add_decoded::<F16>(x, weights, sums),
            Dtype::F32 => self.add_decoded::<F32>(x, weights, sums),
        }
    }
}

impl Fma {
    fn add_decoded<D: Decode>(&self, x: &[Singles], weights: &[&[Line]], sums: &mut [Sums]) {
        let decode = PhantomData::<D>;
        match *weights {
            [a] => run(self.isa, BlockWork { x, weights: [a], sums, decode }),
            [a, b] => run(self.isa, BlockWork { x, weights: [a, b], sums, decode }),
            _ => {}
        }
    }
}

/// Decodes the weights in the words of a line.
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

/// The work of [`Tile::add`], for weights that `D` decodes.
struct BlockWork<'a, D, const P: usize> {
    x: &'a [Singles],
    weights: [&'a [Line]; P],
    sums: &'a mut [Sums],
    decode: PhantomData<D>,
}

impl<D: Decode, const P: usize> Job for BlockWork<'_, D, P> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let w = self.weights;
        for (x, sums) in self.x.chunks(V::ROWS).zip(self.sums.chunks_mut(V::ROWS * P)) {
            match x.len() {
                1 => add_tile::<D, V, 1, P>(x, w, sums),
                2 => add_tile::<D, V, 2, P>(x, w, sums),
                3 => add_tile::<D, V, 3, P>(x, w, sums),
                4 => add_tile::<D, V, 4, P>(x, w, sums),
                5 => add_tile::<D, V, 5, P>(x, w, sums),
                6 => add_tile::<D, V, 6, P>(x, w, sums),
                7 => add_tile::<D, V, 7, P>(x, w, sums),
                8 => add_tile::<D, V, 8, P>(x, w, sums),
                9 => add_tile::<D, V, 9, P>(x, w, sums),
                10 => add_tile::<D, V, 10, P>(x, w, sums),
                11 => add_tile::<D, V, 11, P>(x, w, sums),
                12 => add_tile::<D, V, 12, P>(x, w, sums),
                _ => {}
            }
        }
    }
}

/// `M` rows by `P` panels; the sums stay in registers throughout.
#[inline(always)]
fn add_tile<D: Decode, V: Lanes, const M: usize, const P: usize>(
    x: &[Singles],
    weights: [&[Line]; P],
    sums: &mut [Sums],
) {
    let Some(x) = x.first_chunk::<M>() else { return };
    let lines = weights.iter().map(|w| w.len()).min().unwrap_or(0).min(x[0].0.len() / D::DEPTH);
    let weights = weights.map(|w| &w[..lines]);
    let mut acc = [[V::from_array([0.0; LANES]); P]; M];
    for (acc, sum) in acc.as_flattened_mut().iter_mut().zip(sums.iter()) {
        *acc = V::from_array(sum.0);
    }
    for line in 0..lines {
        for depth in 0..D::DEPTH {
            let mut w = [V::from_array([0.0; LANES]); P];
            for (w, panel) in w.iter_mut().zip(&weights) {
                *w = V::from_array(panel[line].0.map(|word| D::weight(word, depth)));
            }
            for m in 0..M {
                let x = V::splat(x[m].0[line * D::DEPTH + depth]);
                for p in 0..P {
                    acc[m][p] = acc[m][p].add_product(x, w[p]);
                }
            }
        }
    }
    for (acc, sum) in acc.as_flattened().iter().zip(sums) {
        sum.0 = acc.to_array();
    }
}
