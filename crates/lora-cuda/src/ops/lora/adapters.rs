//! The adapters of a step at a site, ready for launches.

use lora_core::Result;
use lora_core::lora::{LoraSite, SiteSpec};

use super::args::{LoraArgs, starts_of};
use super::plan::CudaLoraPlan;
use super::route::{LoraShape, LowRank, Shrink, SiteInput, chunk};
use super::segments::TileSize;
use crate::args::{DeviceMat, MatArg};
use crate::device::Cuda;
use crate::memory::queue::CudaQueue;
use crate::ops::linear::fused_args::{FewRows, ManyRows};

/// The adapters of a step at a site, with scratch memory for `z`.
pub struct SiteAdapters<'a> {
    pub args: LoraArgs,
    pub low_rank: LowRank,
    pub spec: &'a SiteSpec,
    /// Rows of the step.
    pub rows: usize,
    /// Adapters that launches must reach.
    pub segments: usize,
    /// Room for ranks in `z`.
    pub max_rank: usize,
    plan: &'a CudaLoraPlan,
}

impl<'a> SiteAdapters<'a> {
    /// For an op with this input and output, by the kernels that were chosen for `shape`.
    pub fn new(
        q: &mut CudaQueue,
        input: SiteInput,
        site: &'a LoraSite<Cuda>,
        plan: &'a CudaLoraPlan,
        out: DeviceMat,
        shape: &LoraShape<'_>,
        low_rank: LowRank,
    ) -> Result<Self> {
        let (spec, parts) = (&site.spec, plan.parts());
        let (slices, max_rank) = (spec.slices.len(), shape.work.max_rank());
        let (chunk, partials) = split_of_k(spec.in_dim, low_rank);
        let rows = out.layout().rows;
        // As many bytes hold the hi and lo parts in bf16 that the cluster shrink leaves.
        let plane = rows * slices * max_rank * size_of::<f32>();
        let (x, ids) = match input {
            SiteInput::Rows(x) => (x.into(), 0),
            SiteInput::Tokens(ids) => (MatArg::NONE, ids.data()),
        };
        let args = LoraArgs {
            x,
            out: out.into(),
            ids,
            table: site.table.rows(),
            order: parts.row_order.data(),
            starts: parts.starts.data(),
            slots: parts.slots.data(),
            idle: parts.idle_rows.data(),
            tiles: parts.tiles.data(),
            sizes: parts.sizes.data(),
            columns: site.table.columns(),
            z: q.lora_scratch(partials.max(1) * plane)?,
            inputs: q.ready_flags(),
            slices: slices as i32,
            max_rank: max_rank as i32,
            in_dim: spec.in_dim as i32,
            chunk: chunk as i32,
            partials: partials as i32,
            tile_rows: shape.step.tile.rows() as i32,
        };
        Ok(Self { args, low_rank, spec, rows, segments: shape.segments, max_rank, plan })
    }

    /// As the stream GEMM takes them.
    pub fn few_rows(&self) -> FewRows {
        let LoraArgs { table, order, tiles, sizes, z, inputs, slices, max_rank, partials, .. } =
            self.args;
        let starts = starts_of(self.spec);
        FewRows { table, order, tiles, sizes, z, starts, slices, max_rank, partials, inputs }
    }

    /// As the kernels of tiles take them.
    pub fn many_rows(&self) -> ManyRows {
        let (args, parts) = (&self.args, self.plan.parts());
        ManyRows {
            table: args.table,
            slot_of_row: parts.slot_of_row.data(),
            group_starts: parts.group_starts.data(),
            group_slots: parts.group_slots.data(),
            z: args.z,
            starts: starts_of(self.spec),
            slices: args.slices,
            max_rank: args.max_rank,
        }
    }

    /// The most tiles of rows: as many as rows, or as full ones and one more for each segment.
    pub fn tiles(&self, tile: TileSize) -> usize {
        self.rows.min(self.rows / tile.rows() + self.segments)
    }

    /// Columns of the widest slice.
    pub fn widest_slice(&self) -> usize {
        self.spec.slices.iter().map(ExactSizeIterator::len).max().unwrap_or(0)
    }
}

/// Columns of a chunk of K and partials of `z`, as kernels take them: no partials mean hi and lo parts in bf16.
fn split_of_k(in_dim: usize, low_rank: LowRank) -> (usize, usize) {
    match low_rank {
        LowRank::General => (in_dim.max(1), in_dim.div_ceil(in_dim.max(1))),
        LowRank::Mma { shrink: Shrink::SplitK { chunk, partials }, .. } => (chunk, partials),
        LowRank::Mma { shrink: Shrink::Cluster, .. } => (chunk(in_dim), 0),
    }
}
