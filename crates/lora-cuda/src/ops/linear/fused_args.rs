//! The structs by which GEMMs get the adapters that they add themselves.

use crate::args::{Address, assert_layout};

/// The most slices of a site that the fused GEMMs take.
pub const MAX_SLICES: usize = 4;

/// `FewRows` of `lora.cuh`: the adapters of a step of few rows at a site, for the GEMM that follows their shrink.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FewRows {
    pub table: Address,
    pub order: Address,
    pub tiles: Address,
    pub sizes: Address,
    pub z: Address,
    pub starts: [i32; MAX_SLICES],
    pub slices: i32,
    pub max_rank: i32,
    pub partials: i32,
    pub inputs: Address,
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
