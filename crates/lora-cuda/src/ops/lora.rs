//! What adapters add to the output of a base layer.
#![allow(unsafe_code)]

use lora_core::lora::{LoraBatch, LoraSite, SiteKind};
use lora_core::{DType, Error, Mat, Result, check, check_extent};

use super::linear::CudaLinear;
use super::lora_table::Work;
use super::{ROW_THREADS, WARP};
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::device::is_aligned;
use crate::queue::Launch;
use crate::{Cuda, CudaQueue, View, ViewMut};

#[repr(C)]
#[derive(Clone, Copy)]
struct LoraArgs {
    x: MatArg,
    out: MatArg,
    ids: Address,
    table: Address,
    order: Address,
    starts: Address,
    slots: Address,
    tiles: Address,
    sizes: Address,
    columns: Address,
    z: Address,
    slices: i32,
    max_rank: i32,
    in_dim: i32,
    chunk: i32,
    planes: i32,
}

// SAFETY: laid out as `LoraArgs` of `lora.cuh`.
unsafe impl KernelArgs for LoraArgs {
    const KERNELS: &'static [Kernel] = &[
        Kernel::LoraShrink,
        Kernel::LoraExpand,
        Kernel::LoraShrinkMma8,
        Kernel::LoraShrinkMma32,
        Kernel::LoraExpandMma8,
        Kernel::LoraExpandMma32,
    ];
}

/// Ranks of a tile of the shrink, and outputs of a block of the expand, as in `lora_mma.cu`.
const RANKS: usize = 16;
const OUTPUTS: usize = 512;

/// The largest rank of `lora_mma.cu`.
const MMA_MAX_RANK: usize = 256;

/// Columns of K that one block of the shrink sums: small enough to give every multiprocessor work,
/// large enough that planes are few.
fn chunk(in_dim: usize, tile_rows: usize) -> usize {
    match (tile_rows, in_dim) {
        (8, ..=8192) => 512,
        (8, _) => 1024,
        _ => 2048,
    }
}

/// The two products of a batch at a site.
struct Plan {
    args: LoraArgs,
    /// Rows of a tile where tensor cores do the work.
    by_mma: Option<usize>,
    rows: usize,
    tiles: usize,
    slices: usize,
    max_rank: usize,
    planes: usize,
    widest: usize,
}

/// Checks input and output of a linear site.
fn check_linear(x: &View<'_>, site: &LoraSite<Cuda>, out: &ViewMut<'_>) -> Result<()> {
    const OP: &str = "lora_add";
    check::site_output::<Cuda>(OP, &site.spec, SiteKind::Linear, out.geo)?;
    check::float(OP, "x", x.geo.dtype)?;
    check_extent(OP, "columns of x", x.geo.cols, site.spec.in_dim)?;
    check_extent(OP, "rows of out", out.geo.rows, x.geo.rows)
}

impl Cuda {
    /// See [`lora_core::Backend::lora_add`].
    pub(crate) fn add_lora(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        site: &LoraSite<Self>,
        batch: &LoraBatch<Self>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        check_linear(&x, site, out)?;
        self.apply("lora_add", q, (x.into(), x.geo, 0), site, batch, out)
    }

    /// See [`lora_core::Backend::lora_embed`].
    pub(crate) fn add_lora_rows(
        &self,
        q: &mut CudaQueue,
        ids: View<'_>,
        site: &LoraSite<Self>,
        batch: &LoraBatch<Self>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        const OP: &str = "lora_embed";
        check::site_output::<Self>(OP, &site.spec, SiteKind::Embedding, out.geo)?;
        check_extent(OP, "rows of out", out.geo.rows, check::id_row(OP, "ids", ids.geo)?)?;
        self.check_ids(q, [OP, "token id"], ids, site.spec.in_dim)?;
        self.apply(OP, q, (MatArg::NONE, ids.geo, MatArg::from(ids).data()), site, batch, out)
    }

    fn apply(
        &self,
        op: &'static str,
        q: &mut CudaQueue,
        (x, x_geo, ids): (MatArg, Mat, Address),
        site: &LoraSite<Self>,
        batch: &LoraBatch<Self>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let Some(plan) = self.plan(op, q, (x, x_geo, ids), site, batch, out)? else {
            return Ok(());
        };
        self.shrink(q, &plan)?;
        self.expand(q, &plan)
    }

    /// See [`lora_core::Backend::linear_lora`].
    pub(crate) fn multiply_and_add(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        lora: (&LoraSite<Self>, &LoraBatch<Self>),
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let (site, batch) = lora;
        check_linear(&x, site, out)?;
        match self.plan("linear_lora", q, (x.into(), x.geo, 0), site, batch, out)? {
            Some(plan) => {
                self.shrink(q, &plan)?;
                self.multiply(q, x, w, out)?;
                self.expand(q, &plan)
            }
            None => self.multiply(q, x, w, out),
        }
    }

    /// What the two products will do; `None` if there is nothing to do.
    fn plan(
        &self,
        op: &'static str,
        q: &mut CudaQueue,
        (x, x_geo, ids): (MatArg, Mat, Address),
        site: &LoraSite<Self>,
        batch: &LoraBatch<Self>,
        out: &ViewMut<'_>,
    ) -> Result<Option<Plan>> {
        self.check_batch(op, q, site, batch, out.geo.rows)?;
        let (rows, slices) = (out.geo.rows, site.spec.slices.len());
        // What a recorded step finds when it runs is not known yet.
        let most = if q.is_recording() { rows } else { batch.segments() };
        let work = site.table.work();
        if most == 0 || rows == 0 || work == Work::Nothing {
            return Ok(None);
        }
        let max_rank = work.max_rank();
        let suited = matches!(work, Work::Mma(_)) && suits_mma(x_geo, out.geo, max_rank);
        let by_mma = ids == 0 && suited;
        let chunk = if by_mma {
            chunk(site.spec.in_dim, batch.tile_rows())
        } else {
            site.spec.in_dim.max(1)
        };
        let planes = if by_mma { site.spec.in_dim.div_ceil(chunk) } else { 1 };
        let args = LoraArgs {
            x,
            out: out.into(),
            ids,
            table: site.table.rows(),
            order: MatArg::from(batch.row_order()).data(),
            starts: MatArg::from(batch.starts()).data(),
            slots: MatArg::from(batch.slots()).data(),
            tiles: MatArg::from(batch.tiles()).data(),
            sizes: MatArg::from(batch.sizes()).data(),
            columns: site.table.columns(),
            z: q.lora_scratch(planes * rows * slices * max_rank * size_of::<f32>())?,
            slices: slices as i32,
            max_rank: max_rank as i32,
            in_dim: site.spec.in_dim as i32,
            chunk: chunk as i32,
            planes: planes as i32,
        };
        let widest = site.spec.slices.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        // No more tiles than rows, nor than full ones and one that is not for each segment.
        let tile_rows = batch.tile_rows();
        let tiles = rows.min(rows / tile_rows + most);
        let by_mma = by_mma.then_some(tile_rows);
        Ok(Some(Plan { args, by_mma, rows, tiles, slices, max_rank, planes, widest }))
    }

    /// `z = A x`.
    fn shrink(&self, q: &mut CudaQueue, plan: &Plan) -> Result<()> {
        if let Some(tile_rows) = plan.by_mma {
            let ranks = plan.slices * plan.max_rank.div_ceil(RANKS);
            let launch = Launch::new([plan.tiles, ranks, plan.planes], ROW_THREADS);
            let kernel = match tile_rows {
                8 => Kernel::LoraShrinkMma8,
                _ => Kernel::LoraShrinkMma32,
            };
            return q.launch(&self.modules, kernel, launch, plan.args);
        }
        let launch = Launch::new([plan.rows, plan.slices, 1], ROW_THREADS);
        q.launch(&self.modules, Kernel::LoraShrink, launch, plan.args)
    }

    /// `y = gain * (y + scale * B z) + shift`.
    fn expand(&self, q: &mut CudaQueue, plan: &Plan) -> Result<()> {
        if let Some(tile_rows) = plan.by_mma {
            let blocks = [plan.tiles, plan.slices, plan.widest.div_ceil(OUTPUTS)];
            let launch = Launch::new(blocks, ROW_THREADS);
            let kernel = match tile_rows {
                8 => Kernel::LoraExpandMma8,
                _ => Kernel::LoraExpandMma32,
            };
            return q.launch(&self.modules, kernel, launch, plan.args);
        }
        // Each warp takes some outputs, so that blocks are not too many.
        let blocks = [plan.rows, plan.slices, plan.widest.div_ceil(ROW_THREADS / WARP * 8)];
        let launch = Launch::new(blocks, ROW_THREADS);
        q.launch(&self.modules, Kernel::LoraExpand, launch, plan.args)
    }

    /// Checks what the batch points at.
    fn check_batch(
        &self,
        op: &'static str,
        q: &mut CudaQueue,
        site: &LoraSite<Self>,
        batch: &LoraBatch<Self>,
        rows: usize,
    ) -> Result<()> {
        let [order, starts, slots] = [batch.row_order(), batch.starts(), batch.slots()];
        let outside = |limit| {
            let found = batch.segments() as i64;
            Error::OutOfRange { op, what: "segment", found, limit }
        };
        let Some(order) = self.ints(q, order)? else { return Ok(()) };
        let starts = self.ints(q, starts)?.unwrap_or_default();
        let slots = self.ints(q, slots)?.unwrap_or_default();
        check::ids(op, "slot", &slots[..batch.segments()], site.table.slots())?;
        for ends in starts[..=batch.segments()].windows(2) {
            let segment = usize::try_from(ends[0]).ok().zip(usize::try_from(ends[1]).ok());
            let listed = segment.and_then(|(from, to)| order.get(from..to));
            check::ids(op, "row", listed.ok_or_else(|| outside(order.len()))?, rows)?;
        }
        Ok(())
    }
}

/// Whether operands are as the tensor cores' kernels take them.
fn suits_mma(x: Mat, out: Mat, max_rank: usize) -> bool {
    let bf16 = x.dtype == DType::Bf16 && out.dtype == DType::Bf16;
    let ranks = (1..=MMA_MAX_RANK).contains(&max_rank);
    bf16 && ranks && x.cols.is_multiple_of(8) && is_aligned(x)
}
