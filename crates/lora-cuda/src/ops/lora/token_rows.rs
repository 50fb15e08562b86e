//! Rows of the vocabulary that adapters have of their own, in embeddings and in logits.
#![allow(unsafe_code)]

use bytemuck::{Pod, Zeroable};
use lora_core::lora::{LoraPlan, LoraSite, SlotRows};
use lora_core::{Result, check_extent};

use super::checks::check_slots;
use super::plan::CudaLoraPlan;
use super::route::SiteInput;
use crate::args::{Address, DeviceMat, KernelArgs, MatArg, assert_layout, dtype_number};
use crate::device::Cuda;
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::copies::CopyParts;
use crate::memory::queue::CudaQueue;
use crate::ops::common::{ROW_THREADS, WARP};

/// Blocks that share the tokens of one row of logits, at most.
const MAX_BLOCKS: usize = 64;

/// `TokenRows` of `lora.cuh`: one adapter's rows.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, Pod, Zeroable)]
pub struct TokenRows {
    values: Address,
    ids: Address,
    count: i32,
    dtype: i32,
}

assert_layout!(TokenRows is 24 bytes: values at 0, ids at 8, count at 16, dtype at 20);

impl TokenRows {
    /// The rows of an adapter, whose tensors are added to `parts`.
    pub fn new<'a>(parts: &mut CopyParts<'a>, rows: &'a SlotRows) -> Self {
        Self {
            values: parts.push(rows.values.bytes()),
            ids: parts.push(bytemuck::cast_slice(&rows.ids)),
            count: rows.ids.len() as i32,
            dtype: dtype_number(rows.values.dtype()),
        }
    }

    /// Tokens that have a row.
    pub fn count(&self) -> usize {
        self.count as usize
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LoraRowsArgs {
    x: MatArg,
    out: MatArg,
    ids: Address,
    table: Address,
    slots: Address,
    in_dim: i32,
}

assert_layout!(LoraRowsArgs is 96 bytes: x at 0, out at 32, ids at 64, slots at 80, in_dim at 88);

// SAFETY: laid out as `LoraRowsArgs` of `lora.cu`.
unsafe impl KernelArgs for LoraRowsArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::LoraRows];
}

/// Replaces the base layer's output by the rows that adapters have of their own. Low-rank updates are added after
/// that.
pub fn replace_rows(
    cuda: &Cuda,
    op: &'static str,
    q: &mut CudaQueue,
    input: SiteInput,
    site: &LoraSite<Cuda>,
    plan: &CudaLoraPlan,
    out: DeviceMat,
) -> Result<()> {
    let Some((table, max_rows)) = site.table.token_rows() else { return Ok(()) };
    let rows = out.layout().rows;
    check_extent(op, "rows of the batch", plan.rows(), rows)?;
    check_slots(cuda, op, q, site, plan)?;
    let (x, ids, parts) = match input {
        SiteInput::Rows(x) => (x.into(), 0, max_rows.div_ceil(ROW_THREADS / WARP).min(MAX_BLOCKS)),
        SiteInput::Tokens(ids) => (MatArg::NONE, ids.data(), 1),
    };
    let slots = plan.parts().slot_of_row.data();
    let in_dim = site.spec.in_dim as i32;
    let args = LoraRowsArgs { x, out: out.into(), ids, table, slots, in_dim };
    let launch = Launch::new([rows, parts, 1], ROW_THREADS);
    cuda.launch(q, Kernel::LoraRows, launch, args)
}
