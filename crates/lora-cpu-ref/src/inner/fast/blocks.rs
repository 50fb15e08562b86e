//! Activations, copied in the order in which tiles read them.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::super::{
    float16::{bf16_round, bf16_to_f32},
    operand::{Rows, Values},
};

/// Values of k in a block. Two panels of 16-bit weights then take 16 kB, which leaves half of an L1 cache of
/// 32 kB for the activations and sums of a tile.
pub(super) const BLOCK_K: usize = 256;

/// Minimum number of elements for copying in parallel, which is about 10 microseconds of work.
const SERIAL_VALUES: usize = 128 << 10;

/// A block of one row: up to [`BLOCK_K`] values, then zeros.
pub(super) trait ToBlock: Copy + Send + Sync + bytemuck::Zeroable {
    /// Copies `row` over the block's first values.
    fn fill(&mut self, row: Values<'_>);
}

/// Pairs of bfloat16, the earlier k in the lower half: what `vdpbf16ps` multiplies.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Pairs(pub(super) [u32; BLOCK_K / 2]);

/// Values widened to `f32`.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Singles(pub(super) [f32; BLOCK_K]);

impl ToBlock for Pairs {
    fn fill(&mut self, row: Values<'_>) {
        match row {
            Values::Bf16(row) => self.fill_from(row, |v| v),
            Values::F32(row) => self.fill_from(row, bf16_round),
        }
    }
}

impl Pairs {
    fn fill_from<T: Copy>(&mut self, row: &[T], narrow: impl Fn(T) -> bf16) {
        let bits = |v: T| u32::from(narrow(v).to_bits());
        let (pairs, last) = row.as_chunks::<2>();
        for (word, &[low, high]) in self.0.iter_mut().zip(pairs) {
            *word = bits(low) | bits(high) << 16;
        }
        if let (Some(word), &[low]) = (self.0.get_mut(pairs.len()), last) {
            *word = bits(low);
        }
    }
}

impl ToBlock for Singles {
    fn fill(&mut self, row: Values<'_>) {
        match row {
            Values::Bf16(row) => {
                let values = row.iter().map(|v| bf16_to_f32(v.to_bits().into()));
                self.0.iter_mut().zip(values).for_each(|(o, v)| *o = v);
            }
            Values::F32(row) => self.0.iter_mut().zip(row).for_each(|(o, v)| *o = *v),
        }
    }
}

/// Rows of activations cut along k: all rows' first blocks, then all rows' second blocks, ...
pub(super) struct Blocks<B> {
    rows: usize,
    blocks: Vec<B>,
}

impl<B: ToBlock> Blocks<B> {
    /// Copies rows `range` of `x`, each of `k` values.
    pub(super) fn new(x: Rows<'_>, range: Range<usize>, k: usize) -> Self {
        let rows = range.len();
        let mut blocks = bytemuck::zeroed_vec(rows * k.div_ceil(BLOCK_K));
        let fill = |(index, blocks): (usize, &mut [B])| {
            for (m, block) in range.clone().zip(blocks) {
                block.fill(match x.values {
                    Values::Bf16(data) => Values::Bf16(cut(x.row(data, m, k), index)),
                    Values::F32(data) => Values::F32(cut(x.row(data, m, k), index)),
                });
            }
        };
        if rows * k < SERIAL_VALUES {
            blocks.chunks_mut(rows.max(1)).enumerate().for_each(fill);
        } else {
            blocks.par_chunks_mut(rows.max(1)).enumerate().for_each(fill);
        }
        Self { rows, blocks }
    }

    /// Number of rows.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Block `index` of every row.
    pub(super) fn block(&self, index: usize) -> &[B] {
        &self.blocks[index * self.rows..(index + 1) * self.rows]
    }
}

fn cut<T>(row: &[T], block: usize) -> &[T] {
    super::part(row, block * BLOCK_K, BLOCK_K)
}
