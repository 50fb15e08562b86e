//! The adapters of a site in device memory.

use bytemuck::{Pod, Zeroable};
use lora_core::lora::{LoraSite, SiteSpec, SlotSlice};
use lora_core::{DType, HostTensor, MatLayout, Pool, Result, check};

use super::token_rows::TokenRows;
use super::work::{SlotWork, TableWork};
use crate::args::{Address, DeviceMat, assert_layout, dtype_number};
use crate::device::Cuda;
use crate::memory::buffer::CudaBuf;
use crate::memory::copies::{CopyParts, padded};
use crate::memory::queue::CudaQueue;
use crate::ops::common::VEC8;

/// The adapters of one site: a row per slot and slice, and the blocks that rows point into.
pub struct CudaLoraTable {
    rows: CudaBuf,
    columns: CudaBuf,
    slots: Vec<Slot>,
    work: TableWork,
    /// Rows of tokens by slot, from the first adapter on that has any.
    token_rows: Option<TokenRowTable>,
}

/// One resident adapter at this site.
#[derive(Default)]
struct Slot {
    /// Its tensors, which the slot's rows point at.
    block: Option<CudaBuf>,
    work: SlotWork,
}

/// Rows of tokens of all slots.
struct TokenRowTable {
    /// A [`TokenRows`] for each slot.
    entries: CudaBuf,
    /// Room for rows of a slot, which is only ever added.
    max_rows: usize,
}

/// `SlotRow` of `lora.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, Pod, Zeroable)]
struct SlotRow {
    a: Address,
    b: Address,
    replacement: Address,
    gain: Address,
    shift: Address,
    scale: f32,
    rank: i32,
    a_dtype: i32,
    b_dtype: i32,
    replacement_dtype: i32,
    active: i32,
}

assert_layout!(SlotRow is 64 bytes: a at 0, shift at 32, scale at 40, rank at 44, active at 60);

impl CudaLoraTable {
    /// Address of the rows.
    pub(crate) fn rows(&self) -> Address {
        self.rows.address()
    }

    /// Address of the first columns of the slices, and the end of the last.
    pub(crate) fn columns(&self) -> Address {
        self.columns.address()
    }

    /// Number of slots.
    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Whether there ever was an adapter.
    pub(crate) fn has_adapters(&self) -> bool {
        self.work != TableWork::Nothing
    }

    /// Address of the entries of rows of tokens, and the most rows of a slot; `None` as long as no adapter had any.
    pub(crate) fn token_rows(&self) -> Option<(Address, usize)> {
        self.token_rows.as_ref().map(|table| (table.entries.address(), table.max_rows))
    }

    /// What the adapters need.
    pub(crate) fn work(&self) -> TableWork {
        self.work
    }
}

/// See [`lora_core::Backend::lora_table`].
pub fn lora_table(cuda: &Cuda, spec: &SiteSpec, slots: usize) -> Result<CudaLoraTable> {
    let rows = vec![SlotRow::default(); slots * spec.slices.len()];
    let starts = spec.slices.iter().map(|columns| columns.start);
    let columns: Vec<i32> = starts.chain([spec.out_dim()]).map(|column| column as i32).collect();
    Ok(CudaLoraTable {
        rows: cuda.buffer_with(Pool::Adapters, bytemuck::cast_slice(&rows))?,
        columns: cuda.buffer_with(Pool::Adapters, bytemuck::cast_slice(&columns))?,
        slots: (0..slots).map(|_| Slot::default()).collect(),
        work: TableWork::Nothing,
        token_rows: None,
    })
}

/// See [`lora_core::Backend::write_slot`].
pub fn write_slot(
    cuda: &Cuda,
    q: &mut CudaQueue,
    site: &mut LoraSite<Cuda>,
    slot: usize,
    slices: &[Option<SlotSlice>],
) -> Result<()> {
    check::write_slot(&site.spec, site.table.slots.len(), slot, slices)?;
    let mut copies = cuda.copies.borrow_mut();
    let bytes: usize = slices.iter().flatten().map(bytes_of).sum();
    let block = (bytes > 0).then(|| copies.block(bytes)).transpose()?;
    let mut parts = CopyParts::new(block.as_ref().map_or(0, CudaBuf::address));
    let mut filled = Slot::default();
    let rows: Vec<SlotRow> = slices
        .iter()
        .map(|slice| match slice {
            Some(slice) => slot_row(&mut parts, slice, &mut filled.work),
            None => SlotRow::default(),
        })
        .collect();
    // Only sites of one slice have tokens.
    let tokens = slices.iter().flatten().find_map(|slice| slice.rows.as_ref());
    let tokens = tokens.map(|rows| TokenRows::new(&mut parts, rows)).unwrap_or_default();
    if let Some(block) = &block {
        copies.send(q, block, &parts)?;
    }
    filled.block = block;
    // Behind the copies, which the queue waits for.
    upload_entry(q, bytemuck::cast_slice(&rows), &site.table.rows, slot)?;
    write_token_rows(cuda, q, &mut site.table, slot, tokens)?;
    let table = &mut site.table;
    let replaced = std::mem::replace(&mut table.slots[slot], filled);
    let works: Vec<SlotWork> = table.slots.iter().map(|slot| slot.work).collect();
    let work = table.work.after(&works);
    if std::mem::replace(&mut table.work, work) != work {
        cuda.epoch.set(cuda.epoch.get().next());
    }
    // What was started before may still read the old tensors.
    replaced.block.map_or(Ok(()), |block| copies.retire(q, block))
}

/// Writes a slot's entry of rows of tokens. The table of entries is made when the first adapter comes that has such
/// rows, which recorded steps do not know of.
fn write_token_rows(
    cuda: &Cuda,
    q: &mut CudaQueue,
    table: &mut CudaLoraTable,
    slot: usize,
    rows: TokenRows,
) -> Result<()> {
    if table.token_rows.is_none() {
        if rows.count() == 0 {
            return Ok(());
        }
        let empty = vec![TokenRows::default(); table.slots.len()];
        let entries = cuda.buffer_with(Pool::Adapters, bytemuck::cast_slice(&empty))?;
        table.token_rows = Some(TokenRowTable { entries, max_rows: 0 });
    }
    let Some(table) = &mut table.token_rows else { return Ok(()) };
    upload_entry(q, bytemuck::bytes_of(&rows), &table.entries, slot)?;
    let needed = rows.count().next_power_of_two();
    if rows.count() > 0 && needed > table.max_rows {
        table.max_rows = needed;
        cuda.epoch.set(cuda.epoch.get().next());
    }
    Ok(())
}

/// Writes entry `slot` of a table with entries of as many bytes.
fn upload_entry(q: &mut CudaQueue, bytes: &[u8], table: &CudaBuf, slot: usize) -> Result<()> {
    let words = bytes.len() / DType::I32.size();
    let layout = MatLayout { offset: slot * words, ..MatLayout::dense(1, words, DType::I32) };
    q.upload(bytes, DeviceMat::new(table, layout))
}

/// The row of a slice, whose tensors are added to `parts` and whose needs to `work`.
fn slot_row<'a>(parts: &mut CopyParts<'a>, slice: &'a SlotSlice, work: &mut SlotWork) -> SlotRow {
    let mut row = SlotRow { scale: 1.0, ..SlotRow::default() };
    let mut tensor = |t: &'a HostTensor| (parts.push(t.bytes()), dtype_number(t.dtype()));
    if let Some(low) = &slice.low_rank {
        (row.a, row.a_dtype) = tensor(&low.a);
        (row.b, row.b_dtype) = tensor(&low.b);
        row.rank = low.a.shape()[0] as i32;
        row.scale = low.scale;
    }
    if let Some(w) = &slice.replacement {
        (row.replacement, row.replacement_dtype) = tensor(w);
    }
    if let Some(gain) = &slice.gain {
        row.gain = parts.push(bytemuck::cast_slice(gain));
    }
    if let Some(shift) = &slice.shift {
        row.shift = parts.push(bytemuck::cast_slice(shift));
    }
    row.active = i32::from(row.rank > 0 || [row.replacement, row.gain, row.shift] != [0; 3]);
    let in_bf16 = |t: &HostTensor| t.dtype() == DType::Bf16;
    let factors = slice.low_rank.as_ref().is_none_or(|low| in_bf16(&low.a) && in_bf16(&low.b));
    work.is_active |= row.active != 0;
    work.has_gain |= row.gain != 0;
    work.has_shift |= row.shift != 0;
    work.has_odd_rank |= row.rank % VEC8 as i32 != 0;
    work.max_rank = work.max_rank.max(row.rank as usize);
    work.is_general |= slice.replacement.is_some() || !factors;
    row
}

/// Bytes of a block that a slice's tensors take.
fn bytes_of(slice: &SlotSlice) -> usize {
    let factors = slice.low_rank.iter().flat_map(|low| [&low.a, &low.b]);
    let rows = slice.rows.as_ref();
    let tensors = factors.chain(&slice.replacement).chain(rows.map(|rows| &rows.values));
    let tensors = tensors.map(|tensor| tensor.bytes().len());
    let ids = rows.map(|rows| size_of_val(&rows.ids[..]));
    let vectors = [&slice.gain, &slice.shift].into_iter().flatten().map(|v| size_of_val(&v[..]));
    tensors.chain(vectors).chain(ids).map(padded).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_core::lora::SlotLowRank;

    #[test]
    fn rows_point_at_tensors_of_one_block() {
        let matrix = |rows, cols| {
            HostTensor::from_f32(DType::Bf16, vec![rows, cols], &vec![1.0; rows * cols]).unwrap()
        };
        let low_rank = SlotLowRank { a: matrix(3, 100), b: matrix(50, 3), scale: 0.5 };
        let low_rank = SlotSlice { low_rank: Some(low_rank), ..SlotSlice::default() };
        let shift = SlotSlice { shift: Some(vec![0.5; 70]), ..SlotSlice::default() };
        let replacement = SlotSlice { replacement: Some(matrix(9, 9)), ..SlotSlice::default() };
        let start = 1 << 30;
        let (mut parts, mut work) = (CopyParts::new(start), SlotWork::default());
        let slices = [low_rank, shift, replacement];
        let rows = slices.each_ref().map(|slice| slot_row(&mut parts, slice, &mut work));
        // A takes 600 bytes, B 300, the shift 280.
        assert_eq!((rows[0].a, rows[0].b, rows[0].rank), (start, start + 768, 3));
        assert_eq!((rows[1].a, rows[1].shift, rows[1].scale), (0, start + 1280, 1.0));
        assert_eq!(rows[2].replacement, start + 1792);
        assert_eq!(slices.iter().map(bytes_of).sum::<usize>(), 1792 + 256);
        assert_eq!((work.max_rank, work.is_active, work.is_general), (3, true, true));
    }

    #[test]
    fn a_slice_without_effect_is_not_active() {
        let (mut parts, mut work) = (CopyParts::new(0), SlotWork::default());
        let row = slot_row(&mut parts, &SlotSlice::default(), &mut work);
        assert_eq!((row.active, work.is_active, bytes_of(&SlotSlice::default())), (0, false, 0));
    }
}
