//! `y = gain * (y + scale * B z) + shift` of the rows of a step, by a kernel of its own.

use lora_core::Result;

use super::adapters::SiteAdapters;
use super::route::LowRank;
use super::segments::TileSize;
use crate::device::Cuda;
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;
use crate::ops::common::{ROW_THREADS, WARP};

/// Outputs of a block by tensor cores, as in `lora_mma.cu`.
const OUTPUTS: usize = 512;

/// Blocks that keep a device busy.
const BLOCKS: usize = 2048;

/// Outputs of a warp of the general kernel, so that blocks are not too many.
const WARP_OUTPUTS: usize = 8;

/// What an expand finds in the output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    /// The base layer's.
    Base,
    /// Nothing yet: the base layer's is added later.
    Empty,
}

/// Adds `scale * B z`, and applies gain and shift.
pub fn expand(
    cuda: &Cuda,
    q: &mut CudaQueue,
    adapters: &SiteAdapters<'_>,
    output: Output,
) -> Result<()> {
    let (slices, widest) = (adapters.spec.slices.len(), adapters.widest_slice());
    let LowRank::Mma { tile, .. } = adapters.low_rank else {
        let parts = widest.div_ceil(ROW_THREADS / WARP * WARP_OUTPUTS);
        let launch = Launch::new([adapters.rows, slices, parts], ROW_THREADS);
        return cuda.launch(q, Kernel::LoraExpand, launch, adapters.args);
    };
    // Rows without an adapter have tiles, too, where outputs are begun.
    let idle_tiles = match output {
        Output::Base => 0,
        Output::Empty => adapters.rows.div_ceil(tile.rows()),
    };
    let tiles = adapters.tiles(tile) + idle_tiles;
    // A block goes on with other outputs of its rows where there are many blocks.
    let parts = BLOCKS.div_ceil(tiles * slices).min(widest.div_ceil(OUTPUTS));
    let kernel = match (tile, output) {
        (TileSize::Large, Output::Base) => Kernel::LoraExpandMma32,
        (TileSize::Large, Output::Empty) => Kernel::LoraBeginMma32,
        (TileSize::Small, Output::Base) => Kernel::LoraExpandMma8,
        (TileSize::Small, Output::Empty) => Kernel::LoraBeginMma8,
    };
    cuda.launch(q, kernel, Launch::new([tiles, slices, parts], ROW_THREADS), adapters.args)
}
