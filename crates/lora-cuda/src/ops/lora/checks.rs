//! What LoRA ops check about their operands.

use lora_core::lora::{LoraPlan, LoraSite, SiteKind};
use lora_core::{Error, Result, check, check_extent};

use super::plan::CudaLoraPlan;
use crate::device::{Cuda, View, ViewMut};
use crate::memory::queue::CudaQueue;

/// Checks input and output of a linear site.
pub fn check_linear(x: &View<'_>, site: &LoraSite<Cuda>, out: &ViewMut<'_>) -> Result<()> {
    const OP: &str = "lora_add";
    check::site_output::<Cuda>(OP, &site.spec, SiteKind::Linear, out.layout)?;
    check::float(OP, "x", x.layout.dtype)?;
    check_extent(OP, "columns of x", x.layout.cols, site.spec.in_dim)?;
    check_extent(OP, "rows of out", out.layout.rows, x.layout.rows)
}

/// Checks the slots of a step's rows against the table of a site.
pub fn check_slots(
    cuda: &Cuda,
    op: &'static str,
    q: &mut CudaQueue,
    site: &LoraSite<Cuda>,
    plan: &CudaLoraPlan,
) -> Result<()> {
    let slots = cuda.ints(q, plan.parts().slot_of_row)?.unwrap_or_default();
    let used: Vec<i32> = slots.into_iter().filter(|slot| *slot >= 0).collect();
    check::ids(op, "slot", &used, site.table.slots())
}

/// Checks that a plan is one of `rows` rows, and what it points at.
pub fn check_plan(
    cuda: &Cuda,
    op: &'static str,
    q: &mut CudaQueue,
    site: &LoraSite<Cuda>,
    plan: &CudaLoraPlan,
    rows: usize,
) -> Result<()> {
    check_extent(op, "rows of the batch", plan.rows(), rows)?;
    let (parts, segments) = (plan.parts(), plan.shape().segments);
    let Some(order) = cuda.ints(q, parts.row_order)? else { return Ok(()) };
    let starts = cuda.ints(q, parts.starts)?.unwrap_or_default();
    let slots = cuda.ints(q, parts.slots)?.unwrap_or_default();
    check::ids(op, "slot", &slots[..segments], site.table.slots())?;
    let outside = |limit| Error::OutOfRange { op, what: "segment", found: segments as i64, limit };
    for ends in starts[..=segments].windows(2) {
        let segment = usize::try_from(ends[0]).ok().zip(usize::try_from(ends[1]).ok());
        let listed = segment.and_then(|(from, to)| order.get(from..to));
        check::ids(op, "row", listed.ok_or_else(|| outside(order.len()))?, rows)?;
    }
    Ok(())
}
