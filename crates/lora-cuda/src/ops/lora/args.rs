//! The structs by which kernels get the adapters of a site.
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

/// The most slices of a site that the fused GEMMs take.
pub const MAX_SLICES: usize = 4;

/// `FewRows` of `lora.cuh`: the adapters of a step of few rows at a site, for the GEMM that follows their shrink.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FewRows {
    table: Address,
    order: Address,
    tiles: Address,
    sizes: Address,
    z: Address,
    starts: [i32; MAX_SLICES],
    slices: i32,
    max_rank: i32,
    partials: i32,
    inputs: Address,
}

assert_layout!(
    FewRows is 80 bytes:
    table at 0, z at 32, starts at 40, slices at 56, partials at 64, inputs at 72
);

impl FewRows {
    /// No adapters.
    pub const NONE: Self = Self {
        table: 0,
        order: 0,
        tiles: 0,
        sizes: 0,
        z: 0,
        starts: [0; MAX_SLICES],
        slices: 0,
        max_rank: 0,
        partials: 0,
        inputs: 0,
    };

    /// The adapters that a shrink with `args` has seen.
    pub fn new(args: &LoraArgs, spec: &SiteSpec) -> Self {
        let LoraArgs { table, order, tiles, sizes, z, inputs, slices, max_rank, partials, .. } =
            *args;
        let starts = starts_of(spec);
        Self { table, order, tiles, sizes, z, starts, slices, max_rank, partials, inputs }
    }

    /// How many slices the site has; 0 where there are no adapters.
    pub fn slices(&self) -> usize {
        self.slices as usize
    }
}

/// `ManyRows` of `linear_tiles.cuh`: the adapters of a step of many rows at a site, by groups of neighbouring rows.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ManyRows {
    pub table: Address,
    pub slot_of_row: Address,
    pub group_starts: Address,
    pub group_slots: Address,
    pub z: Address,
    pub starts: [i32; MAX_SLICES + 1],
    pub slices: i32,
    pub max_rank: i32,
}

assert_layout!(
    ManyRows is 72 bytes:
    table at 0, z at 32, starts at 40, slices at 60, max_rank at 64
);

impl ManyRows {
    /// No adapters.
    pub const NONE: Self = Self {
        table: 0,
        slot_of_row: 0,
        group_starts: 0,
        group_slots: 0,
        z: 0,
        starts: [0; MAX_SLICES + 1],
        slices: 0,
        max_rank: 0,
    };
}

/// Where the slices of a site begin, and its end in the places of those that it has not.
pub fn starts_of<const N: usize>(spec: &SiteSpec) -> [i32; N] {
    let of = |i: usize| spec.slices.get(i).map_or(spec.out_dim(), |columns| columns.start);
    std::array::from_fn(|i| of(i) as i32)
}
