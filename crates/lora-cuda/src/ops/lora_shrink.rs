//! `scale * A x` for many rows, as products of many rows take it in.
#![allow(unsafe_code)]

use lora_core::Result;

use super::WARP;
use super::lora::{LoraArgs, RANKS};
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::queue::Launch;
use crate::{Cuda, CudaQueue};

#[repr(C)]
#[derive(Clone, Copy)]
struct ShrinkArgs {
    x: MatArg,
    table: Address,
    order: Address,
    tiles: Address,
    sizes: Address,
    z: Address,
    slices: i32,
    max_rank: i32,
    chunk: i32,
}

// SAFETY: laid out as `ShrinkArgs` of `lora_shrink.cu`.
unsafe impl KernelArgs for ShrinkArgs {
    const KERNELS: &'static [Kernel] =
        &[Kernel::LoraShrinkRows1, Kernel::LoraShrinkRows2, Kernel::LoraShrinkRows4];
}

/// Rows of a tile, which the kernel takes for granted.
pub const TILE_ROWS: usize = 32;

/// Blocks that share the terms of a sum: such clusters run on all multiprocessors at once, larger ones do not.
const BLOCKS: usize = 2;

/// As in `lora_shrink.cu`: warps of a block, and columns of K of a warp.
const WARPS: usize = 8;
const STEP: usize = 32;

/// Bytes of shared memory: for what each warp loads.
pub const SHARED: usize = WARPS * (24 << 10);

/// Bytes of `z`: two numbers in bf16 for each rank of each slice.
pub fn bytes_of_z(rows: usize, slices: usize, max_rank: usize) -> usize {
    rows * slices * 2 * max_rank * 2
}

impl Cuda {
    /// `z = scale * A x` of up to `tiles` tiles of [`TILE_ROWS`] rows, to where `args` has it.
    pub(super) fn shrink_rows(
        &self,
        q: &mut CudaQueue,
        args: &LoraArgs,
        tiles: usize,
    ) -> Result<()> {
        let (slices, max_rank) = (args.slices as usize, args.max_rank as usize);
        let in_dim = args.in_dim as usize;
        let chunk = in_dim.div_ceil(BLOCKS).next_multiple_of(WARPS * STEP);
        let units = slices * max_rank.div_ceil(RANKS);
        let (kernel, together) = match units {
            1 => (Kernel::LoraShrinkRows1, 1),
            2 => (Kernel::LoraShrinkRows2, 2),
            _ => (Kernel::LoraShrinkRows4, 4),
        };
        let blocks = in_dim.div_ceil(chunk).max(1);
        let launch = Launch {
            grid: [tiles, units.div_ceil(together), blocks],
            threads: WARPS * WARP,
            shared: SHARED,
            cluster: blocks,
        };
        let LoraArgs { x, table, order, tiles, sizes, z, slices, max_rank, .. } = *args;
        let chunk = chunk as i32;
        let args = ShrinkArgs { x, table, order, tiles, sizes, z, slices, max_rank, chunk };
        q.launch(&self.modules, kernel, launch, args)
    }
}
