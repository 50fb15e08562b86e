//! What adapters add to the output of a base layer.
#![allow(unsafe_code)]

use lora_core::lora::{LoraBatch, LoraSite, SiteKind};
use lora_core::{Error, Result, check, check_extent};

use super::{ROW_THREADS, WARP};
use crate::args::{Address, Kernel, KernelArgs, MatArg};
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
    columns: Address,
    z: Address,
    segments: i32,
    slices: i32,
    max_rank: i32,
    in_dim: i32,
}

/// [`LoraArgs`] for `z = A x`.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Shrink(LoraArgs);

/// [`LoraArgs`] for `y += B z`.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Expand(LoraArgs);

// SAFETY: laid out as `LoraArgs` of `lora.cu`.
unsafe impl KernelArgs for Shrink {
    const KERNEL: Kernel = Kernel::LoraShrink;
}

// SAFETY: laid out as `LoraArgs` of `lora.cu`.
unsafe impl KernelArgs for Expand {
    const KERNEL: Kernel = Kernel::LoraExpand;
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
        const OP: &str = "lora_add";
        check::site_output::<Self>(OP, &site.spec, SiteKind::Linear, out.geo)?;
        check::float(OP, "x", x.geo.dtype)?;
        check_extent(OP, "columns of x", x.geo.cols, site.spec.in_dim)?;
        check_extent(OP, "rows of out", out.geo.rows, x.geo.rows)?;
        self.apply(OP, q, (x.into(), 0), site, batch, out)
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
        self.apply(OP, q, (MatArg::NONE, MatArg::from(ids).data()), site, batch, out)
    }

    fn apply(
        &self,
        op: &'static str,
        q: &mut CudaQueue,
        (x, ids): (MatArg, Address),
        site: &LoraSite<Self>,
        batch: &LoraBatch<Self>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        self.check_batch(op, q, site, batch, out.geo.rows)?;
        let (rows, slices) = (out.geo.rows, site.spec.slices.len());
        if batch.segments == 0 || rows == 0 {
            return Ok(());
        }
        let max_rank = site.table.max_rank();
        let args = LoraArgs {
            x,
            out: out.into(),
            ids,
            table: site.table.rows(),
            order: MatArg::from(batch.row_order.view()).data(),
            starts: MatArg::from(batch.starts.view()).data(),
            slots: MatArg::from(batch.slots.view()).data(),
            columns: site.table.columns(),
            z: q.scratch(rows * slices * max_rank * size_of::<f32>())?,
            segments: batch.segments as i32,
            slices: slices as i32,
            max_rank: max_rank as i32,
            in_dim: site.spec.in_dim as i32,
        };
        if max_rank > 0 {
            let launch = Launch::new([rows, slices, 1], ROW_THREADS);
            q.launch(&self.modules, launch, Shrink(args))?;
        }
        let widest = site.spec.slices.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        // Each warp takes some outputs, so that blocks are not too many.
        let parts = widest.div_ceil(ROW_THREADS / WARP * 8);
        q.launch(&self.modules, Launch::new([rows, slices, parts], ROW_THREADS), Expand(args))
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
        let [order, starts, slots] =
            [&batch.row_order, &batch.starts, &batch.slots].map(|tensor| tensor.view());
        let outside = |limit| {
            let found = batch.segments as i64;
            Error::OutOfRange { op, what: "segment", found, limit }
        };
        if batch.segments > slots.geo.cols || batch.segments >= starts.geo.cols {
            return Err(outside(slots.geo.cols));
        }
        let Some(order) = self.ints(q, order)? else { return Ok(()) };
        let starts = self.ints(q, starts)?.unwrap_or_default();
        let slots = self.ints(q, slots)?.unwrap_or_default();
        check::ids(op, "slot", &slots[..batch.segments], site.table.slots())?;
        for ends in starts[..=batch.segments].windows(2) {
            let segment = usize::try_from(ends[0]).ok().zip(usize::try_from(ends[1]).ok());
            let listed = segment.and_then(|(from, to)| order.get(from..to));
            check::ids(op, "row", listed.ok_or_else(|| outside(order.len()))?, rows)?;
        }
        Ok(())
    }
}
