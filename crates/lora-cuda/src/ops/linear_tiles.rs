//! Products of many rows with what adapters add, in one kernel.
#![allow(unsafe_code)]

use lora_core::lora::{LoraBatch, SiteSpec};
use lora_core::{DType, Mat, Result};

use super::linear::CudaLinear;
use super::linear_stream::{SWIZZLE, TensorMap};
use super::lora::LoraArgs;
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::device::is_aligned;
use crate::queue::Launch;
use crate::{Cuda, CudaQueue, View, ViewMut};

/// Rows from which on the kernel is about as fast as cuBLASLt's, which leaves adapters to others.
const LEAST_ROWS: usize = 1536;

/// Rows from which on it is the fastest to begin outputs with what adapters add.
const LEAST_ROWS_TO_BEGIN: usize = 512;

/// The most rows that the kernel takes: 64 groups of 256.
const MOST_ROWS: usize = 64 * LoraBatch::<Cuda>::GROUP_ROWS;

/// Adapters of a group of rows, on average, up to which their factors are taken into the product: each costs
/// about half a step of K.
const MOST_ADAPTERS: usize = 16;

/// As in `linear_tiles.cu`: rows and outputs of a tile, blocks of a cluster, threads, rows of a group of
/// consumers, and slices.
const ROWS: usize = 128;
const OUTPUTS: usize = 256;
const CLUSTER: usize = 2;
const THREADS: usize = 384;
const GROUP_ROWS: usize = 64;
const MOST_SLICES: usize = 4;

/// Bytes of `Control`: barriers, factors, slots of rows, and counts.
const CONTROL: usize = 4 * 4 * 8 + 32 * 24 + ROWS * 4 + 64 * MOST_SLICES * 2;

/// Bytes of shared memory: stages, boxes of outputs, `Control`, and room to align them.
pub const SHARED: usize =
    4 * (ROWS + OUTPUTS) * SWIZZLE + 4 * GROUP_ROWS * SWIZZLE + CONTROL + 1024;

/// Clusters that an H100 or H200 runs at once.
const CLUSTERS: usize = 66;

#[repr(C)]
#[derive(Clone, Copy)]
struct ManyRows {
    table: Address,
    slot_of_row: Address,
    group_starts: Address,
    group_slots: Address,
    z: Address,
    starts: [i32; MOST_SLICES + 1],
    slices: i32,
    max_rank: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct TilesArgs {
    w: TensorMap,
    x: TensorMap,
    out: TensorMap,
    bias: Address,
    lora: ManyRows,
    rows: i32,
    cols: i32,
    steps: i32,
}

// SAFETY: laid out as `TilesArgs` of `linear_tiles.cu`.
unsafe impl KernelArgs for TilesArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::LinearTiles, Kernel::LinearTilesBegin];
}

/// Whether the kernel takes the adapters of this batch at this site, if the output is in bf16.
pub fn suits(batch: &LoraBatch<Cuda>, spec: &SiteSpec, rows: usize) -> bool {
    let groups = rows.div_ceil(LoraBatch::<Cuda>::GROUP_ROWS);
    let few = batch.group_slot_count() <= MOST_ADAPTERS * groups;
    (LEAST_ROWS_TO_BEGIN..=MOST_ROWS).contains(&rows) && few && spec.slices.len() <= MOST_SLICES
}

/// Whether [`Cuda::multiply_tiles`] takes these operands, and is the fastest.
pub fn suits_operands(x: Mat, w: Mat, out: Mat) -> bool {
    let dtypes = [x.dtype, w.dtype, out.dtype] == [DType::Bf16; 3];
    let even = w.cols.is_multiple_of(8) && w.rows.is_multiple_of(8);
    x.rows >= LEAST_ROWS && dtypes && even && is_aligned(x) && is_aligned(w) && is_aligned(out)
}

/// A matrix as the kernel reads it.
#[derive(Clone, Copy)]
struct Operand {
    mat: MatArg,
    geo: Mat,
}

/// The adapters of a batch at a site, of which `args` has `z`.
#[derive(Clone, Copy)]
pub struct Adapters<'a> {
    /// Where everything lies.
    pub args: &'a LoraArgs,
    /// The batch.
    pub batch: &'a LoraBatch<Cuda>,
    /// The site.
    pub spec: &'a SiteSpec,
}

impl Adapters<'_> {
    fn many_rows(&self) -> ManyRows {
        let Self { args, batch, spec } = self;
        let mut starts = [spec.out_dim() as i32; MOST_SLICES + 1];
        for (start, columns) in starts.iter_mut().zip(&spec.slices) {
            *start = columns.start as i32;
        }
        let address = |view| MatArg::from(view).data();
        ManyRows {
            table: args.table,
            slot_of_row: address(batch.slot_of_row()),
            group_starts: address(batch.group_starts()),
            group_slots: address(batch.group_slots()),
            z: args.z,
            starts,
            slices: args.slices,
            max_rank: args.max_rank,
        }
    }
}

impl Cuda {
    /// `out = x wᵀ + bias` with what adapters add.
    pub(super) fn multiply_tiles(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        adapters: Adapters<'_>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let x = Operand { mat: x.into(), geo: x.geo };
        let weights = Operand { mat: w.weights(), geo: w.geo() };
        self.launch_tiles(q, Some((x, weights)), w.bias(), adapters, out)
    }

    /// `out` = what adapters add, and 0 where there are none.
    pub(super) fn begin_by_tiles(
        &self,
        q: &mut CudaQueue,
        adapters: Adapters<'_>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        self.launch_tiles(q, None, 0, adapters, out)
    }

    fn launch_tiles(
        &self,
        q: &mut CudaQueue,
        operands: Option<(Operand, Operand)>,
        bias: Address,
        adapters: Adapters<'_>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let outputs = Operand { mat: out.into(), geo: out.geo };
        let map = |of: Operand, rows| TensorMap::of(of.mat, of.geo, rows);
        // Without steps the kernel reads neither, but maps must be of something.
        let (x, w) = operands.unwrap_or((outputs, outputs));
        let bytes = operands.map_or(0, |(x, _)| x.geo.cols * x.geo.dtype.size());
        let tiles = TilesArgs {
            w: map(w, OUTPUTS / CLUSTER)?,
            x: map(x, ROWS)?,
            out: map(outputs, GROUP_ROWS)?,
            bias,
            lora: adapters.many_rows(),
            rows: out.geo.rows as i32,
            cols: out.geo.cols as i32,
            steps: bytes.div_ceil(SWIZZLE) as i32,
        };
        let of_rows = out.geo.rows.div_ceil(CLUSTER * ROWS);
        let clusters = (of_rows * out.geo.cols.div_ceil(OUTPUTS)).min(CLUSTERS);
        let launch = Launch {
            grid: [clusters, 1, CLUSTER],
            threads: THREADS,
            shared: SHARED,
            cluster: CLUSTER,
        };
        let kernel = match operands {
            Some(_) => Kernel::LinearTiles,
            None => Kernel::LinearTilesBegin,
        };
        q.launch(&self.modules, kernel, launch, tiles)
    }
}
