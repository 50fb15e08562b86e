//! Rows of the vocabulary that adapters have of their own, in embeddings and in logits.
#![allow(unsafe_code)]

use bytemuck::{Pod, Zeroable};
use lora_core::lora::{LoraPlan, LoraSite, SlotRows};
use lora_core::{Result, check_extent};

use super::plan::CudaLoraPlan;
use crate::args::{Address, Kernel, KernelArgs, MatArg, dtype_number};
use crate::memory::copies::Parts;
use crate::memory::queue::Launch;
use crate::ops::{ROW_THREADS, WARP};
use crate::{Cuda, CudaQueue, ViewMut};

/// Blocks that share the tokens of one row of logits, at most.
const MAX_BLOCKS: usize = 64;

/// `TokenRows` of `lora.cuh`: one adapter's rows.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, Pod, Zeroable)]
pub(crate) struct TokenRows {
    values: Address,
    ids: Address,
    count: i32,
    dtype: i32,
}

impl TokenRows {
    /// The rows of an adapter, whose numbers are added to `parts`.
    pub(crate) fn new<'a>(parts: &mut Parts<'a>, rows: &'a SlotRows) -> Self {
        Self {
            values: parts.push(rows.values.bytes()),
            ids: parts.push(bytemuck::cast_slice(&rows.ids)),
            count: rows.ids.len() as i32,
            dtype: dtype_number(rows.values.dtype()),
        }
    }

    /// Tokens that have a row.
    pub(crate) fn count(&self) -> usize {
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

// SAFETY: laid out as `LoraRowsArgs` of `lora.cu`.
unsafe impl KernelArgs for LoraRowsArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::LoraRows];
}

/// The input of a site: a matrix, or the address of token ids.
#[derive(Clone, Copy)]
pub(crate) enum SiteInput {
    Matrix(MatArg),
    Ids(Address),
}

impl Cuda {
    /// Puts the rows that adapters have of their own in place of the base layer's output. Comes before
    /// what low-rank updates add.
    pub(crate) fn replace_rows(
        &self,
        op: &'static str,
        q: &mut CudaQueue,
        input: SiteInput,
        site: &LoraSite<Self>,
        batch: &CudaLoraPlan,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let Some((table, most)) = site.table.token_rows() else { return Ok(()) };
        check_extent(op, "rows of the batch", batch.rows(), out.layout.rows)?;
        self.check_slots(op, q, site, batch)?;
        let (x, ids, parts) = match input {
            SiteInput::Matrix(x) => (x, 0, most.div_ceil(ROW_THREADS / WARP).min(MAX_BLOCKS)),
            SiteInput::Ids(ids) => (MatArg::NONE, ids, 1),
        };
        let slots = MatArg::from(batch.slot_of_row()).data();
        let in_dim = site.spec.in_dim as i32;
        let args = LoraRowsArgs { x, out: out.into(), ids, table, slots, in_dim };
        let launch = Launch::new([out.layout.rows, parts, 1], ROW_THREADS);
        q.launch(&self.modules, Kernel::LoraRows, launch, args)
    }
}
