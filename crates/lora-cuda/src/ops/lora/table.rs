//! The adapters of a site in device memory.

use bytemuck::{Pod, Zeroable};
use lora_core::lora::{LoraSite, SiteSpec, SlotSlice};
use lora_core::{DType, HostTensor, MatLayout, Pool, Result, ViewMut, check};

use super::rows::TokenRows;
use crate::args::{Address, dtype_number};
use crate::memory::copies::{Parts, padded};
use crate::ops::EIGHT;
use crate::{Cuda, CudaBuf, CudaQueue};

/// The adapters of one site: a row per slot and slice, and the blocks that rows point into.
pub struct CudaLoraTable {
    rows: CudaBuf,
    columns: CudaBuf,
    slots: Vec<Slot>,
    work: Work,
    /// Rows of tokens by slot, and most of them that a slot has had; from the first adapter on that has any.
    token_rows: Option<(CudaBuf, usize)>,
}

/// What the adapters of a table need done, as far as launches depend on it. Recorded steps take it for
/// granted, so it changes seldom: room for ranks is only ever added.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Work {
    /// Nothing: there never was an adapter.
    #[default]
    Nothing,
    /// Products by tensor cores, for ranks up to this one, and factors of outputs if there are `gains`. If all
    /// are `plain`, products of many rows take them in: two factors, of ranks in vec8, and no more.
    Mma { rank: usize, gains: bool, plain: bool },
    /// Something that the tensor cores' kernels do not take, for ranks up to this one.
    General(usize),
}

impl Work {
    /// What these adapters need, who come after others that needed `self`.
    fn after(self, slots: &[Slot]) -> Self {
        let rank = slots.iter().map(|slot| slot.max_rank).max().unwrap_or(0);
        let rank = rank.next_power_of_two().max(MIN_RANK).max(self.max_rank());
        let gains = slots.iter().any(|slot| slot.has_gain);
        match (slots.iter().any(|slot| slot.is_general), self) {
            (true, _) => Self::General(rank),
            (false, Self::Nothing) if slots.iter().all(|slot| !slot.is_active) => Self::Nothing,
            (false, _) => Self::Mma { rank, gains, plain: slots.iter().all(Slot::is_plain) },
        }
    }

    /// Room for ranks between the two products.
    pub(crate) fn max_rank(self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Mma { rank, .. } | Self::General(rank) => rank,
        }
    }
}

/// Ranks that there is room for from the first adapter on: those of a tile of the shrink.
const MIN_RANK: usize = 16;

/// One resident adapter at this site.
#[derive(Default)]
struct Slot {
    /// Its tensors, which the slot's rows point at.
    block: Option<CudaBuf>,
    max_rank: usize,
    /// Whether any slice has an effect.
    is_active: bool,
    /// Whether any slice has factors of outputs.
    has_gain: bool,
    /// Whether any slice has summands of outputs.
    has_shift: bool,
    /// Whether the rank of any slice is no multiple of eight.
    has_odd_rank: bool,
    /// Whether a slice has something that the tensor cores' kernels do not take: factors in another
    /// dtype than bf16, or a matrix in the base layer's place.
    is_general: bool,
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

impl CudaLoraTable {
    /// Where the rows are.
    pub(crate) fn rows(&self) -> Address {
        self.rows.address()
    }

    /// Where the first columns of the slices are, and the end of the last.
    pub(crate) fn columns(&self) -> Address {
        self.columns.address()
    }

    /// Number of slots.
    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Whether there ever was an adapter.
    pub(crate) fn has_adapters(&self) -> bool {
        self.work != Work::Nothing
    }

    /// Where the rows of tokens are, by slot, and most of them that a slot has; `None` as long as no
    /// adapter has any.
    pub(crate) fn token_rows(&self) -> Option<(Address, usize)> {
        self.token_rows.as_ref().map(|(rows, most)| (rows.address(), *most))
    }

    /// What the adapters need done.
    pub(crate) fn work(&self) -> Work {
        self.work
    }
}

impl Cuda {
    /// See [`lora_core::Backend::lora_table`].
    pub(crate) fn empty_table(&self, spec: &SiteSpec, slots: usize) -> Result<CudaLoraTable> {
        let rows = vec![SlotRow::default(); slots * spec.slices.len()];
        let starts = spec.slices.iter().map(|columns| columns.start);
        let columns: Vec<i32> =
            starts.chain([spec.out_dim()]).map(|column| column as i32).collect();
        Ok(CudaLoraTable {
            rows: self.hold(Pool::Adapters, bytemuck::cast_slice(&rows))?,
            columns: self.hold(Pool::Adapters, bytemuck::cast_slice(&columns))?,
            slots: (0..slots).map(|_| Slot::default()).collect(),
            work: Work::Nothing,
            token_rows: None,
        })
    }

    /// See [`lora_core::Backend::write_slot`].
    pub(crate) fn fill_slot(
        &self,
        q: &mut CudaQueue,
        site: &mut LoraSite<Self>,
        slot: usize,
        slices: &[Option<SlotSlice>],
    ) -> Result<()> {
        check::write_slot(&site.spec, site.table.slots.len(), slot, slices)?;
        let mut copies = self.copies.borrow_mut();
        let bytes: usize = slices.iter().flatten().map(bytes_of).sum();
        let block = (bytes > 0).then(|| copies.block(bytes)).transpose()?;
        let mut parts = Parts::new(block.as_ref().map_or(0, CudaBuf::address));
        let mut filled = Slot::default();
        let rows: Vec<SlotRow> = slices
            .iter()
            .map(|slice| match slice {
                Some(slice) => filled.row(&mut parts, slice),
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
        let bytes: &[u8] = bytemuck::cast_slice(&rows);
        let words = bytes.len() / DType::I32.size();
        let mut layout = MatLayout::dense(1, words, DType::I32);
        layout.offset = slot * words;
        // Behind the copies, which the queue waits for.
        q.upload(bytes, &ViewMut { buf: &mut site.table.rows, layout })?;
        self.write_token_rows(q, &mut site.table, slot, tokens)?;
        let table = &mut site.table;
        let replaced = std::mem::replace(&mut table.slots[slot], filled);
        let work = table.work.after(&table.slots);
        if std::mem::replace(&mut table.work, work) != work {
            self.adapters_changed.set(self.adapters_changed.get() + 1);
        }
        // What was started before may still read the old tensors.
        replaced.block.map_or(Ok(()), |block| copies.retire(q, block))
    }

    /// Says where a slot's rows of tokens are. Room for them is made when the first adapter comes that has
    /// any, which recorded steps do not know of.
    fn write_token_rows(
        &self,
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
            let held = self.hold(Pool::Adapters, bytemuck::cast_slice(&empty))?;
            table.token_rows = Some((held, 0));
        }
        let Some((held, most)) = &mut table.token_rows else { return Ok(()) };
        let bytes: &[u8] = bytemuck::bytes_of(&rows);
        let words = bytes.len() / DType::I32.size();
        let mut layout = MatLayout::dense(1, words, DType::I32);
        layout.offset = slot * words;
        q.upload(bytes, &ViewMut { buf: held, layout })?;
        let needed = rows.count().next_power_of_two();
        if rows.count() > 0 && needed > *most {
            *most = needed;
            self.adapters_changed.set(self.adapters_changed.get() + 1);
        }
        Ok(())
    }
}

impl Slot {
    /// Whether it is two factors, of ranks in vec8, and no more.
    fn is_plain(&self) -> bool {
        !(self.has_gain || self.has_shift || self.has_odd_rank)
    }

    /// The row of a slice, whose tensors are added to `parts`.
    fn row<'a>(&mut self, parts: &mut Parts<'a>, slice: &'a SlotSlice) -> SlotRow {
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
        self.is_active |= row.active != 0;
        self.has_gain |= row.gain != 0;
        self.has_shift |= row.shift != 0;
        self.has_odd_rank |= row.rank % EIGHT as i32 != 0;
        self.max_rank = self.max_rank.max(row.rank as usize);
        let narrow = |t: &HostTensor| t.dtype() == DType::Bf16;
        let factors = slice.low_rank.as_ref().is_none_or(|low| narrow(&low.a) && narrow(&low.b));
        self.is_general |= slice.replacement.is_some() || !factors;
        row
    }
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
        let (mut parts, mut slot) = (Parts::new(start), Slot::default());
        let slices = [low_rank, shift, replacement];
        let rows = slices.each_ref().map(|slice| slot.row(&mut parts, slice));
        // A takes 600 bytes, B 300, the shift 280.
        assert_eq!((rows[0].a, rows[0].b, rows[0].rank), (start, start + 768, 3));
        assert_eq!((rows[1].a, rows[1].shift, rows[1].scale), (0, start + 1280, 1.0));
        assert_eq!(rows[2].replacement, start + 1792);
        assert_eq!(slices.iter().map(bytes_of).sum::<usize>(), 1792 + 256);
        assert_eq!((slot.max_rank, slot.is_active, slot.is_general), (3, true, true));
    }

    #[test]
    fn a_slice_without_effect_is_not_active() {
        let (mut parts, mut slot) = (Parts::new(0), Slot::default());
        let row = slot.row(&mut parts, &SlotSlice::default());
        assert_eq!((row.active, slot.is_active, bytes_of(&SlotSlice::default())), (0, false, 0));
    }
}
