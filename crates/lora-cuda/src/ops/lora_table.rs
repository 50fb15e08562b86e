//! The adapters of a site in device memory.

use bytemuck::{Pod, Zeroable};
use lora_core::lora::{LoraSite, SiteSpec, SlotSlice};
use lora_core::{DType, HostTensor, Mat, Pool, Result, ViewMut, check};

use crate::args::{Address, dtype_number};
use crate::{Cuda, CudaBuf, CudaQueue};

/// The adapters of one site: a row per slot and slice, and the blocks that rows point into.
pub struct CudaLoraTable {
    rows: CudaBuf,
    columns: CudaBuf,
    slots: Vec<Slot>,
    work: Work,
}

/// What the adapters of a table need done, as far as launches depend on it. Recorded steps take it for
/// granted, so it changes seldom: room for ranks is only ever added.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Work {
    /// Nothing: there never was an adapter.
    #[default]
    Nothing,
    /// Products by tensor cores, for ranks up to this one, and factors of outputs if there are `gains`.
    Mma { rank: usize, gains: bool },
    /// Something that the tensor cores' kernels do not take, for ranks up to this one.
    General(usize),
}

impl Work {
    /// What these adapters need, who come after others that needed `self`.
    fn after(self, slots: &[Slot]) -> Self {
        let rank = slots.iter().map(|slot| slot.max_rank).max().unwrap_or(0);
        let rank = rank.next_power_of_two().max(LEAST_RANK).max(self.max_rank());
        let gains = slots.iter().any(|slot| slot.has_gain);
        match (slots.iter().any(|slot| slot.is_general), self) {
            (true, _) => Self::General(rank),
            (false, Self::Nothing) if slots.iter().all(|slot| !slot.is_active) => Self::Nothing,
            (false, _) => Self::Mma { rank, gains },
        }
    }

    /// Room for ranks between the two products.
    pub(super) fn max_rank(self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Mma { rank, .. } | Self::General(rank) => rank,
        }
    }
}

/// Ranks that there is room for from the first adapter on: those of a tile of the shrink.
const LEAST_RANK: usize = 16;

/// One resident adapter at this site.
#[derive(Default)]
struct Slot {
    /// Its tensors, which the slot's rows point at.
    _blocks: Vec<CudaBuf>,
    max_rank: usize,
    /// Whether any slice has an effect.
    is_active: bool,
    /// Whether any slice has factors of outputs.
    has_gain: bool,
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
    pub(super) fn rows(&self) -> Address {
        self.rows.address()
    }

    /// Where the first columns of the slices are, and the end of the last.
    pub(super) fn columns(&self) -> Address {
        self.columns.address()
    }

    /// Number of slots.
    pub(super) fn slots(&self) -> usize {
        self.slots.len()
    }

    /// What the adapters need done.
    pub(super) fn work(&self) -> Work {
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
        let mut filled = Slot::default();
        let mut rows = Vec::with_capacity(slices.len());
        for slice in slices {
            rows.push(match slice {
                Some(slice) => self.row(&mut filled, slice)?,
                None => SlotRow::default(),
            });
        }
        let bytes: &[u8] = bytemuck::cast_slice(&rows);
        let words = bytes.len() / DType::I32.size();
        let mut geo = Mat::dense(1, words, DType::I32);
        geo.offset = slot * words;
        q.upload(bytes, &ViewMut { buf: &mut site.table.rows, geo })?;
        // The old blocks go once nothing that was started before can read them.
        q.synchronize()?;
        let table = &mut site.table;
        table.slots[slot] = filled;
        let work = table.work.after(&table.slots);
        if std::mem::replace(&mut table.work, work) != work {
            self.adapters_changed.set(self.adapters_changed.get() + 1);
        }
        Ok(())
    }

    /// Puts the tensors of a slice into device memory.
    fn row(&self, slot: &mut Slot, slice: &SlotSlice) -> Result<SlotRow> {
        let mut row = SlotRow { active: 1, scale: 1.0, ..SlotRow::default() };
        let mut hold = |bytes: &[u8]| {
            let block = self.hold(Pool::Adapters, bytes)?;
            let address = block.address();
            slot._blocks.push(block);
            Ok::<_, lora_core::Error>(address)
        };
        let mut tensor =
            |t: &HostTensor| Ok::<_, lora_core::Error>((hold(t.bytes())?, dtype_number(t.dtype())));
        if let Some(low) = &slice.low_rank {
            (row.a, row.a_dtype) = tensor(&low.a)?;
            (row.b, row.b_dtype) = tensor(&low.b)?;
            row.rank = low.a.shape()[0] as i32;
            row.scale = low.scale;
        }
        if let Some(w) = &slice.replacement {
            (row.replacement, row.replacement_dtype) = tensor(w)?;
        }
        if let Some(gain) = &slice.gain {
            row.gain = hold(bytemuck::cast_slice(gain))?;
        }
        if let Some(shift) = &slice.shift {
            row.shift = hold(bytemuck::cast_slice(shift))?;
        }
        row.active = i32::from(row.rank > 0 || [row.replacement, row.gain, row.shift] != [0; 3]);
        slot.is_active |= row.active != 0;
        slot.has_gain |= row.gain != 0;
        slot.max_rank = slot.max_rank.max(row.rank as usize);
        let narrow = |t: &HostTensor| t.dtype() == DType::Bf16;
        let factors = slice.low_rank.as_ref().is_none_or(|low| narrow(&low.a) && narrow(&low.b));
        slot.is_general |= slice.replacement.is_some() || !factors;
        Ok(row)
    }
}
