//! The struct by which kernels get the adapters of a site.
#![allow(unsafe_code)]

use lora_core::lora::SiteSpec;

use crate::args::{Address, KernelArgs, MatArg, assert_layout};
use crate::library::functions::Kernel;

/// `LoraArgs` of `lora.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LoraArgs {
    pub x: MatArg,
    pub out: MatArg,
    pub ids: Address,
    pub table: Address,
    pub order: Address,
    pub starts: Address,
    pub slots: Address,
    pub idle: Address,
    pub tiles: Address,
    pub sizes: Address,
    pub columns: Address,
    pub z: Address,
    pub inputs: Address,
    pub slices: i32,
    pub max_rank: i32,
    pub in_dim: i32,
    pub chunk: i32,
    pub partials: i32,
    pub tile_rows: i32,
}

assert_layout!(
    LoraArgs is 176 bytes:
    x at 0, out at 32, ids at 64, table at 72, idle at 104, z at 136, inputs at 144, slices at 152,
    partials at 168, tile_rows at 172
);

// SAFETY: laid out as `LoraArgs` of `lora.cuh`.
unsafe impl KernelArgs for LoraArgs {
    const KERNELS: &'static [Kernel] = &[
        Kernel::LoraShrink,
        Kernel::LoraExpand,
        Kernel::LoraShrinkMma,
        Kernel::LoraExpandMma8,
        Kernel::LoraExpandMma32,
        Kernel::LoraBeginMma8,
        Kernel::LoraBeginMma32,
    ];
}

/// Ranks of a tile of a shrink, as in `lora_mma.cu` and `lora_shrink.cu`.
pub const RANKS: usize = 16;

/// First column of each slice of a site, padded with the end of the last.
pub fn starts_of<const N: usize>(spec: &SiteSpec) -> [i32; N] {
    let of = |i: usize| spec.slices.get(i).map_or(spec.out_dim(), |columns| columns.start);
    std::array::from_fn(|i| of(i) as i32)
}
