//! Which kernels apply adapters. Nothing here touches a device.

use std::ops::Range;

use lora_core::lora::SiteSpec;
use lora_core::{DType, MatLayout};

use super::args::RANKS;
use super::segments::{GROUP_ROWS, Spread, StepShape, TileSize};
use super::work::TableWork;
use crate::args::DeviceMat;
use crate::ops::common::{WARP, is_aligned};
use crate::ops::linear::choice::{Gemm, GemmShape};
use crate::ops::linear::fused_args::MAX_SLICES;
use crate::ops::linear::{stream_cut, tiles};

/// The largest rank of the tensor cores' kernels, as in `lora_mma.cu`.
const MAX_MMA_RANK: usize = 256;

/// Minimum rows, in large tiles, from which on the cluster shrink is faster than split-K partials.
const MIN_ROWS_FOR_CLUSTER: usize = 512;

/// The most rows that GEMMs of tiles take adapters for: 64 groups.
const MAX_TILES_ROWS: usize = 64 * GROUP_ROWS;

/// Adapters of a group of rows, on average, up to which GEMMs of tiles take their factors in: each costs about half
/// a step of K.
const MAX_GROUP_ADAPTERS: usize = 16;

/// Widths of slices are multiples of this where the stream GEMM adds adapters: the outputs of its warpgroups.
const STREAM_SLICE: usize = stream_cut::OUTPUTS;

/// Tiles of rows times sixteens of ranks that the stream GEMM expands while it multiplies a tile of weights.
const MAX_HIDDEN_PIECES: usize = 16;

/// The input of a site.
#[derive(Clone, Copy, Debug)]
pub enum SiteInput {
    /// A row of activations for each row of the output.
    Rows(DeviceMat),
    /// A row of token ids, for an embedding.
    Tokens(DeviceMat),
}

/// What the choice of kernels for a site and a step depends on.
#[derive(Clone, Copy, Debug)]
pub struct LoraShape<'a> {
    /// Activations; `None` where the input is token ids.
    pub x: Option<MatLayout>,
    /// Output.
    pub out: MatLayout,
    /// Extents of the site.
    pub spec: &'a SiteSpec,
    /// What the adapters of the site need.
    pub work: TableWork,
    /// Whether adapters have rows of the vocabulary of their own.
    pub has_token_rows: bool,
    /// The step, whose rows are those of `out`.
    pub step: StepShape,
    /// Adapters that launches must reach.
    pub segments: usize,
}

/// How `z = A x` is computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shrink {
    /// `lora_mma.cu`: K is split into chunks of `chunk` columns, whose partial sums of f32 readers of `z` add in
    /// their order, so that nothing is zeroed and nothing depends on the order of blocks.
    SplitK {
        /// Columns of a chunk.
        chunk: usize,
        /// Chunks.
        partials: usize,
    },
    /// `lora_shrink.cu`: clusters add their partial sums and leave `z` as hi and lo parts in bf16.
    Cluster,
}

/// The kernels of shrink and expand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LowRank {
    /// `lora.cu`: any dtype, rank and replacement, without tensor cores.
    General,
    /// Tensor cores.
    Mma {
        /// The shrink.
        shrink: Shrink,
        /// Rows of one adapter that a block takes together.
        tile: TileSize,
    },
}

/// The kernels of a projection with its adapters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// The projection, then `lora_add` as an op of its own: rows of the vocabulary take the place of what the base
    /// layer writes before updates are added to them.
    Separate,
    /// The projection alone: there is nothing to add.
    Base,
    /// Both.
    Adapted(LowRank, Fusion),
}

/// Where the expand of adapters happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fusion {
    /// In the epilogue of the stream GEMM.
    Stream,
    /// In the GEMM of tiles, which takes z and B as further terms of its sums.
    Tiles,
    /// Before the GEMM, by the kernel of [`Fusion::Tiles`] into an empty output; cuBLASLt then adds the product.
    BeginByTiles,
    /// The same by the kernel of an expand of its own.
    Begin,
    /// After the GEMM.
    AfterGemm(Gemm),
}

/// The kernels of a projection with its adapters and its SwiGLU gate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GatedRoute {
    /// One op after another.
    Separate,
    /// The GEMM of tiles applies the gate. There are no adapters.
    Tiles,
    /// The GEMM of tiles takes adapters in and applies the gate.
    TilesWithAdapters(LowRank),
    /// `linear`, then the kernel of tiles adds adapters and applies the gate.
    GateAfterGemm(LowRank),
}

/// The kernels of `linear_lora`.
pub fn choose(gemm: &GemmShape, lora: &LoraShape<'_>, multiprocessors: usize) -> Route {
    if lora.has_token_rows {
        return Route::Separate;
    }
    match lora.low_rank() {
        None => Route::Base,
        Some(low_rank) => Route::Adapted(low_rank, lora.fusion(low_rank, gemm, multiprocessors)),
    }
}

/// The kernels of `gated_linear_lora`: `gemm` writes both halves, of which `out` gets the gated one.
pub fn choose_gated(
    gemm: &GemmShape,
    lora: Option<&LoraShape<'_>>,
    out: MatLayout,
    multiprocessors: usize,
) -> GatedRoute {
    let (x, w) = (gemm.x, gemm.w.layout);
    let Some((lora, low_rank)) = lora.and_then(|lora| Some((lora, lora.low_rank()?))) else {
        let fused = tiles::suits_gate(x, w, out, multiprocessors);
        return if fused { GatedRoute::Tiles } else { GatedRoute::Separate };
    };
    if !lora.suits_tiles(low_rank) || out.dtype != DType::Bf16 || !is_aligned(out) {
        GatedRoute::Separate
    } else if tiles::suits(x, w, out) {
        GatedRoute::TilesWithAdapters(low_rank)
    } else {
        GatedRoute::GateAfterGemm(low_rank)
    }
}

impl LoraShape<'_> {
    /// The kernels of shrink and expand; `None` if there is nothing to add.
    pub fn low_rank(&self) -> Option<LowRank> {
        if self.segments == 0 || self.out.rows == 0 || self.work == TableWork::Nothing {
            return None;
        }
        if !self.suits_mma() {
            return Some(LowRank::General);
        }
        let tile = self.step.tile;
        let shrink = if tile == TileSize::Large && self.out.rows >= MIN_ROWS_FOR_CLUSTER {
            Shrink::Cluster
        } else {
            let chunk = chunk(self.spec.in_dim);
            Shrink::SplitK { chunk, partials: self.spec.in_dim.div_ceil(chunk).max(1) }
        };
        Some(LowRank::Mma { shrink, tile })
    }

    /// Whether adapters and operands are as the tensor cores' kernels take them.
    fn suits_mma(&self) -> bool {
        let Some(x) = self.x else { return false };
        let bf16 = x.dtype == DType::Bf16 && self.out.dtype == DType::Bf16;
        let ranks = (1..=MAX_MMA_RANK).contains(&self.work.max_rank());
        let adapters = matches!(self.work, TableWork::Mma { .. });
        adapters && bf16 && ranks && x.cols.is_multiple_of(8) && is_aligned(x)
    }

    fn fusion(&self, low_rank: LowRank, gemm: &GemmShape, multiprocessors: usize) -> Fusion {
        let kernel = gemm.choose();
        if self.suits_tiles(low_rank) && tiles::suits(gemm.x, gemm.w.layout, gemm.out) {
            Fusion::Tiles
        } else if kernel == Gemm::Stream && self.suits_stream(low_rank, multiprocessors) {
            Fusion::Stream
        } else if self.suits_begin(low_rank) && gemm.suits_lt() {
            if self.suits_tiles(low_rank) { Fusion::BeginByTiles } else { Fusion::Begin }
        } else {
            Fusion::AfterGemm(kernel)
        }
    }

    /// Whether the stream GEMM takes these adapters, and is not slowed down by their expand.
    fn suits_stream(&self, low_rank: LowRank, multiprocessors: usize) -> bool {
        let LowRank::Mma { shrink: Shrink::SplitK { .. }, tile } = low_rank else { return false };
        let slices = &self.spec.slices;
        let even = |columns: &Range<usize>| columns.end.is_multiple_of(STREAM_SLICE);
        let hidden = expand_is_hidden(
            self.out.rows.div_ceil(tile.rows()),
            self.work.max_rank(),
            self.out.cols,
            multiprocessors,
        );
        slices.len() <= MAX_SLICES
            && slices.iter().all(even)
            && self.step.spread == Spread::Few
            && hidden
    }

    /// Whether the kernels of tiles take these adapters.
    fn suits_tiles(&self, low_rank: LowRank) -> bool {
        let cluster = matches!(low_rank, LowRank::Mma { shrink: Shrink::Cluster, .. });
        let plain = matches!(self.work, TableWork::Mma { plain: true, .. });
        let groups = self.out.rows.div_ceil(GROUP_ROWS);
        let few = self.step.group_slots <= MAX_GROUP_ADAPTERS * groups;
        let fits = self.out.rows <= MAX_TILES_ROWS && self.spec.slices.len() <= MAX_SLICES;
        cluster && plain && few && fits && is_aligned(self.out)
    }

    /// Whether the LoRA term may be written before the base layer's output, and saves a pass over it: cuBLASLt
    /// reads it while it computes. Gains apply to the base layer's output and have to come after it.
    fn suits_begin(&self, low_rank: LowRank) -> bool {
        let mma = matches!(low_rank, LowRank::Mma { .. });
        let gains = matches!(self.work, TableWork::Mma { gains: true, .. });
        mma && !gains && self.out.rows > stream_cut::MAX_ROWS
    }
}

/// Columns of K that one block of the split-K shrink sums: small enough to give every multiprocessor work, large
/// enough that partials are few. It depends on the site alone, as does how a row is summed by these kernels.
pub fn chunk(in_dim: usize) -> usize {
    const MAX_PARTIALS: usize = 16;
    const MIN_CHUNK: usize = 512;
    in_dim.div_ceil(MAX_PARTIALS).next_multiple_of(WARP).max(MIN_CHUNK)
}

/// Whether the next tile's LoRA expand hides behind this tile's GEMM; trivially true with one tile for each block.
fn expand_is_hidden(
    row_tiles: usize,
    max_rank: usize,
    outputs: usize,
    multiprocessors: usize,
) -> bool {
    let one_tile_each = outputs <= multiprocessors * stream_cut::OUTPUTS;
    row_tiles * max_rank.div_ceil(RANKS) <= MAX_HIDDEN_PIECES || one_tile_each
}

#[cfg(test)]
mod tests;
