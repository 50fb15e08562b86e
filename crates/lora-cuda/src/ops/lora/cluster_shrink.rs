//! `z = scale * A x` for many rows, by clusters of blocks that split K.
#![allow(unsafe_code)]

use lora_core::Result;

use super::args::{LoraArgs, RANKS};
use crate::args::{Address, KernelArgs, MatArg, assert_layout};
use crate::device::Cuda;
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;
use crate::tensor_map::SWIZZLE;

#[repr(C)]
#[derive(Clone, Copy)]
struct ShrinkArgs {
    x: MatArg,
    table: Address,
    order: Address,
    starts: Address,
    slots: Address,
    sizes: Address,
    z: Address,
    slices: i32,
    max_rank: i32,
    steps: i32,
}

assert_layout!(ShrinkArgs is 96 bytes: x at 0, table at 32, sizes at 64, z at 72, slices at 80, steps at 88);

// SAFETY: laid out as `ShrinkArgs` of `lora_shrink.cu`.
unsafe impl KernelArgs for ShrinkArgs {
    const KERNELS: &'static [Kernel] =
        &[Kernel::LoraShrinkRows1, Kernel::LoraShrinkRows2, Kernel::LoraShrinkRows4];
}

/// As in `lora_shrink.cu`: rows of a tile, columns of K in a step, stages of the ring, and threads.
const ROWS: usize = 128;
const COLUMNS: usize = 64;
const STAGES: usize = 4;
const THREADS: usize = 384;

/// The most blocks of a cluster, and blocks that a multiprocessor runs at once.
const MAX_CLUSTER: usize = 8;
const BLOCKS_PER_MULTIPROCESSOR: usize = 2;

/// Minimum steps of K of a block: below, the exchange of sums costs more than the block saves.
const MIN_STEPS: usize = 4;

/// The most units of sixteen ranks that a block takes.
const MAX_UNITS: usize = 4;

/// Bytes of shared memory of a block that takes so many units: the ring, its barriers, the tile, and room to align
/// them.
const fn shared(units: usize) -> usize {
    STAGES * (ROWS + units * RANKS) * SWIZZLE + STAGES * 16 + 12 + 1024
}

const _: () = assert!(shared(MAX_UNITS) == Kernel::LoraShrinkRows4.max_shared());

/// How a shrink is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Cut {
    /// Tiles of rows, of which some may be empty.
    tiles: usize,
    /// Units of sixteen ranks that a block takes, and blocks that it takes for all units.
    units: usize,
    parts: usize,
    /// Blocks of a cluster, which split K, and steps of K of each.
    cluster: usize,
    steps: usize,
}

impl Cut {
    fn new(
        rows: usize,
        segments: usize,
        units: usize,
        in_dim: usize,
        multiprocessors: usize,
    ) -> Self {
        let together = units.next_power_of_two().min(MAX_UNITS);
        let parts = units.div_ceil(together);
        // A segment has a tile that is not full; half of one, on average.
        let usual_tiles = rows / ROWS + segments.div_ceil(2);
        let all_steps = in_dim.div_ceil(COLUMNS);
        let at_once = BLOCKS_PER_MULTIPROCESSOR * multiprocessors;
        let wanted = (at_once / (usual_tiles * parts).max(1)).min(all_steps / MIN_STEPS);
        // Larger clusters, and those of odd sizes, leave multiprocessors idle; where K has few steps,
        // rounding may still take a block off.
        let blocks = 1 << wanted.clamp(1, MAX_CLUSTER).ilog2();
        let steps = all_steps.div_ceil(blocks).max(1);
        let tiles = rows.min(rows / ROWS + segments);
        let cluster = all_steps.div_ceil(steps).max(1);
        Self { tiles, units: together, parts, cluster, steps }
    }
}

/// `z = scale * A x` of `rows` rows with up to `segments` adapters, to where `args` has it: for each rank its hi and
/// lo parts in bf16, as the GEMM of many rows takes them in.
pub fn shrink(
    cuda: &Cuda,
    q: &mut CudaQueue,
    args: &LoraArgs,
    rows: usize,
    segments: usize,
) -> Result<()> {
    let LoraArgs { x, table, order, starts, slots, sizes, z, slices, max_rank, .. } = *args;
    let units = slices as usize * (max_rank as usize / RANKS);
    let cut = Cut::new(rows, segments, units, args.in_dim as usize, cuda.multiprocessors);
    let launch = Launch {
        grid: [cut.tiles, cut.parts, cut.cluster],
        threads: THREADS,
        shared: shared(cut.units),
        cluster: cut.cluster,
    };
    let kernel = match cut.units {
        1 => Kernel::LoraShrinkRows1,
        2 => Kernel::LoraShrinkRows2,
        _ => Kernel::LoraShrinkRows4,
    };
    let steps = cut.steps as i32;
    let args = ShrinkArgs { x, table, order, starts, slots, sizes, z, slices, max_rank, steps };
    cuda.launch(q, kernel, launch, args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shrink_is_cut_to_fill_the_device_once() {
        let cut = |rows, segments, units, in_dim| {
            let cut = Cut::new(rows, segments, units, in_dim, 132);
            [cut.tiles, cut.units, cut.parts, cut.cluster, cut.steps]
        };
        assert_eq!(cut(2048, 8, 3, 4096), [24, 4, 1, 8, 8]);
        assert_eq!(cut(2048, 1, 12, 4096), [17, 4, 3, 4, 16]);
        assert_eq!(cut(8192, 8, 1, 4096), [72, 1, 1, 2, 32]);
        assert_eq!(cut(1 << 14, 1, 12, 14336), [129, 4, 3, 1, 224]);
        assert_eq!(cut(129, 2, 2, 72), [3, 2, 1, 1, 2]);
        assert_eq!(cut(5, 9, 1, 8), [5, 1, 1, 1, 1]);
    }
}
