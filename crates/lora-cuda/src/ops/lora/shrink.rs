//! `z = A x` of the rows of a step.

use lora_core::Result;

use super::adapters::SiteAdapters;
use super::args::RANKS;
use super::cluster_shrink;
use super::route::{LowRank, Shrink};
use crate::device::Cuda;
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;
use crate::ops::common::ROW_THREADS;

/// Rows and threads of a block of the split-K shrink, as in `lora_mma.cu`.
const ROWS: usize = 8;
const THREADS: usize = 128;

/// `z = A x`.
pub fn shrink(cuda: &Cuda, q: &mut CudaQueue, adapters: &SiteAdapters<'_>) -> Result<()> {
    let SiteAdapters { args, rows, segments, low_rank, .. } = adapters;
    let slices = adapters.spec.slices.len();
    match low_rank {
        LowRank::General => {
            let launch = Launch::new([*rows, slices, 1], ROW_THREADS);
            cuda.launch(q, Kernel::LoraShrink, launch, *args)
        }
        LowRank::Mma { shrink: Shrink::Cluster, .. } => {
            cluster_shrink::shrink(cuda, q, args, *rows, *segments)
        }
        LowRank::Mma { shrink: Shrink::SplitK { partials, .. }, tile } => {
            let ranks = slices * adapters.max_rank.div_ceil(RANKS);
            let blocks = [adapters.tiles(*tile) * tile.rows() / ROWS, ranks, *partials];
            cuda.launch(q, Kernel::LoraShrinkMma, Launch::new(blocks, THREADS), *args)
        }
    }
}
