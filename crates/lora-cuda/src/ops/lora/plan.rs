//! Which adapter each row of a step uses, sorted once and shared by all layers.

use std::ops::Range;

use bytemuck::cast_slice;

use lora_core::lora::LoraPlan;
use lora_core::{Backend, DType, Pool, Result, Tensor, check};

use crate::{Cuda, CudaQueue, View};

/// Rows of a batch grouped by the slot of their adapter; rows without an adapter are left out.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct RowPlan {
    /// Rows that have an adapter, those of one slot side by side, in ascending order in a slot.
    pub row_order: Vec<i32>,
    /// Start of each segment of `row_order`, then its length; empty when there are no segments.
    pub starts: Vec<i32>,
    /// Slot of each segment, ascending.
    pub slots: Vec<i32>,
    /// Segments cut into tiles of up to [`RowPlan::tile_rows`] rows, for kernels that share an
    /// adapter's factors among them: first entry in `row_order`, number of entries, slot, and 0.
    pub tiles: Vec<[i32; 4]>,
    /// Rows that have no adapter, in ascending order.
    pub idle_rows: Vec<i32>,
    /// Slot of each row, negative where there is no adapter.
    pub slot_of_row: Vec<i32>,
    /// Of each group of [`CudaLoraPlan::GROUP_ROWS`] neighbouring rows: where its slots begin in `group_slots`; then
    /// their number.
    pub group_starts: Vec<i32>,
    /// Slots that rows of a group have, ascending in each group.
    pub group_slots: Vec<i32>,
    /// Rows of a full tile.
    pub tile_rows: usize,
    /// Rows of the batch, those without an adapter included.
    pub rows: usize,
}

/// Rows of a tile where adapters have few rows, as when sequences decode, and where they have many.
const TILE_ROWS: [usize; 2] = [8, 32];

/// Rows from which on large tiles keep a device busy, and rows an adapter that fill half of one.
const MANY_ROWS: [usize; 2] = [128, 16];

/// Rows of a group, for kernels that take neighbouring rows together.
const GROUP_ROWS: usize = 256;

/// Tiles up to which adapters count as few.
const FEW_TILES: usize = 16;

/// How many adapters the rows of a batch have.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) enum Spread {
    /// None.
    #[default]
    None,
    /// So few that most have several rows, or that there are few rows.
    Few,
    /// About one for each row.
    Many,
}

impl RowPlan {
    /// Groups rows by slot; `slot_of_row[i] < 0` means that row `i` has no adapter.
    pub fn new(slot_of_row: &[i32]) -> Self {
        let mut rows: Vec<(i32, i32)> = slot_of_row
            .iter()
            .zip(0..)
            .filter(|(slot, _)| **slot >= 0)
            .map(|(s, r)| (*s, r))
            .collect();
        rows.sort_unstable();
        let idle = slot_of_row.iter().zip(0..).filter(|(slot, _)| **slot < 0);
        let idle_rows = idle.map(|(_, row)| row).collect();
        let slot_of_row = slot_of_row.to_vec();
        let mut plan = Self { rows: slot_of_row.len(), idle_rows, slot_of_row, ..Self::default() };
        plan.group();
        for chunk in rows.chunk_by(|a, b| a.0 == b.0) {
            plan.slots.push(chunk[0].0);
            plan.starts.push(plan.row_order.len() as i32);
            plan.row_order.extend(chunk.iter().map(|(_, row)| row));
        }
        if !plan.slots.is_empty() {
            plan.starts.push(plan.row_order.len() as i32);
        }
        let (rows, segments, [least, of_each]) =
            (plan.row_order.len(), plan.slots.len(), MANY_ROWS);
        plan.tile_rows = TILE_ROWS[usize::from(rows >= least && rows >= of_each * segments)];
        plan.tiles = plan.cut(plan.tile_rows as i32);
        plan
    }

    /// How many adapters there are.
    pub fn spread(&self) -> Spread {
        match self.tiles.len() {
            0 => Spread::None,
            1..=FEW_TILES => Spread::Few,
            tiles if tiles * 4 <= self.rows => Spread::Few,
            _ => Spread::Many,
        }
    }

    /// Lists the slots of each group of rows.
    fn group(&mut self) {
        self.group_starts.push(0);
        for rows in self.slot_of_row.chunks(GROUP_ROWS) {
            let mut slots: Vec<i32> = rows.iter().copied().filter(|slot| *slot >= 0).collect();
            slots.sort_unstable();
            slots.dedup();
            self.group_slots.append(&mut slots);
            self.group_starts.push(self.group_slots.len() as i32);
        }
    }

    fn cut(&self, rows: i32) -> Vec<[i32; 4]> {
        let segments = self.starts.windows(2).zip(&self.slots);
        let tiles = |(ends, slot): (&[i32], &i32)| {
            let (start, end, slot) = (ends[0], ends[1], *slot);
            let starts = (start..end).step_by(rows as usize);
            starts.map(move |from| [from, rows.min(end - from), slot, 0])
        };
        segments.flat_map(tiles).collect()
    }
}

/// A [`RowPlan`] in device memory, refilled for each step. Where its parts lie depends on the number
/// of rows alone, so that steps with as many rows find them in the same places.
pub struct CudaLoraPlan {
    words: Tensor<Cuda>,
    capacity: usize,
    rows: usize,
    tile_rows: usize,
    segments: usize,
    group_slots: usize,
    spread: Spread,
}

/// Where the parts of a batch of `rows` rows lie, in words. Tiles come first, as they are read 16
/// bytes at a time.
fn places(rows: usize) -> [Range<usize>; 9] {
    let mut end = 0;
    let groups = rows.div_ceil(GROUP_ROWS);
    [4 * rows, SIZES, rows, rows + 1, rows, rows, rows, groups + 1, rows].map(|words| {
        let start = end;
        end += words;
        start..end
    })
}

/// Words of [`CudaLoraPlan::sizes`].
const SIZES: usize = 3;

impl CudaLoraPlan {
    /// Neighbouring rows whose slots are listed together.
    pub(crate) const GROUP_ROWS: usize = GROUP_ROWS;

    /// Room for `capacity` rows; empty until [`CudaLoraPlan::fill`].
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn new(be: &Cuda, capacity: usize) -> Result<Self> {
        let [.., last] = places(capacity);
        let words = Tensor::zeros(be, Pool::StepInputs, 1, last.end, DType::I32)?;
        Ok(Self {
            words,
            capacity,
            rows: 0,
            tile_rows: TILE_ROWS[0],
            segments: 0,
            group_slots: 0,
            spread: Spread::None,
        })
    }

    /// See [`Backend::plan_lora`].
    pub(crate) fn fill(&mut self, be: &Cuda, q: &mut CudaQueue, slots: &[i32]) -> Result<()> {
        check::plan_room("plan_lora", slots.len(), self.capacity)?;
        let plan = &RowPlan::new(slots);
        (self.rows, self.tile_rows, self.segments) = (plan.rows, plan.tile_rows, plan.slots.len());
        (self.spread, self.group_slots) = (plan.spread(), plan.group_slots.len());
        let sizes = [plan.slots.len(), plan.row_order.len(), plan.tiles.len()].map(|n| n as i32);
        let parts: [&[i32]; 9] = [
            plan.tiles.as_flattened(),
            &sizes,
            &plan.row_order,
            &plan.starts,
            &plan.slots,
            &plan.idle_rows,
            &plan.slot_of_row,
            &plan.group_starts,
            &plan.group_slots,
        ];
        let places = places(plan.rows);
        let mut words = vec![0; places[8].end];
        for (place, part) in places.into_iter().zip(parts) {
            words[place][..part.len()].copy_from_slice(part);
        }
        let mut view = self.words.view_mut();
        view.layout = view.layout.slice_cols(0..words.len());
        be.upload(q, cast_slice(&words), view)
    }

    /// Tiles of the plan: `[1, 4 * rows]` i32.
    pub(crate) fn tiles(&self) -> View<'_> {
        self.part(0)
    }

    /// Number of segments, of rows in the row order, and of tiles: `[1, 3]` i32. A recorded step
    /// reads it where it cannot know [`CudaLoraPlan::segments`].
    pub(crate) fn sizes(&self) -> View<'_> {
        self.part(1)
    }

    /// Row order of the plan: `[1, rows]` i32.
    pub(crate) fn row_order(&self) -> View<'_> {
        self.part(2)
    }

    /// Segment starts: `[1, rows + 1]` i32.
    pub(crate) fn starts(&self) -> View<'_> {
        self.part(3)
    }

    /// Slot of each segment: `[1, rows]` i32.
    pub(crate) fn slots(&self) -> View<'_> {
        self.part(4)
    }

    /// Rows that have no adapter, as many as the row order leaves: `[1, rows]` i32.
    pub(crate) fn idle_rows(&self) -> View<'_> {
        self.part(5)
    }

    /// Slot of each row, negative where there is no adapter: `[1, rows]` i32.
    pub(crate) fn slot_of_row(&self) -> View<'_> {
        self.part(6)
    }

    /// Where the slots of each group of [`CudaLoraPlan::GROUP_ROWS`] rows begin, and the end:
    /// `[1, groups + 1]` i32.
    pub(crate) fn group_starts(&self) -> View<'_> {
        self.part(7)
    }

    /// Slots of each group of rows: `[1, rows]` i32, of which [`CudaLoraPlan::group_slot_count`] are used.
    pub(crate) fn group_slots(&self) -> View<'_> {
        self.part(8)
    }

    /// Number of slots that groups of rows have, all groups together.
    pub(crate) fn group_slot_count(&self) -> usize {
        self.group_slots
    }

    /// Rows of a full tile.
    pub(crate) fn tile_rows(&self) -> usize {
        self.tile_rows
    }

    /// The most adapters of a batch with as many rows, and as many in a tile: what a recorded step may find
    /// when it runs.
    pub(crate) fn most_segments(&self) -> usize {
        let [_, large] = TILE_ROWS;
        let [_, of_each] = MANY_ROWS;
        if self.tile_rows == large { self.rows / of_each } else { self.rows }
    }

    /// How many adapters the rows have. Recorded steps take it for granted, and the rows of a tile.
    pub(crate) fn spread(&self) -> Spread {
        self.spread
    }

    /// Number of segments of the current step.
    pub(crate) fn segments(&self) -> usize {
        self.segments
    }

    fn part(&self, part: usize) -> View<'_> {
        self.words.view().slice_cols(places(self.rows)[part].clone())
    }
}

impl LoraPlan for CudaLoraPlan {
    type Key = CudaLoraKey;

    fn rows(&self) -> usize {
        self.rows
    }

    fn has_adapters(&self) -> bool {
        self.segments > 0
    }

    fn key(&self) -> CudaLoraKey {
        CudaLoraKey { spread: self.spread, tile_rows: self.tile_rows }
    }
}

/// What a recorded step takes for granted of a plan: by these, kernels are chosen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CudaLoraKey {
    spread: Spread,
    tile_rows: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_without_an_adapter_are_left_out() {
        for rows in [&[-1, -1][..], &[]] {
            let plan = RowPlan::new(rows);
            assert!(plan.row_order.is_empty() && plan.starts.is_empty() && plan.tiles.is_empty());
            assert_eq!(plan.spread(), Spread::None);
        }
    }

    #[test]
    fn adapters_are_few_where_rows_share_them_or_are_few() {
        let in_turn = |rows: i32, adapters| (0..rows).map(|row| row % adapters).collect::<Vec<_>>();
        for (rows, adapters, spread) in [
            (8, 8, Spread::Few),
            (64, 8, Spread::Few),
            (64, 64, Spread::Many),
            (256, 8, Spread::Few),
        ] {
            assert_eq!(
                RowPlan::new(&in_turn(rows, adapters)).spread(),
                spread,
                "{rows} {adapters}"
            );
        }
    }

    #[test]
    fn rows_of_one_slot_stand_together() {
        let plan = RowPlan::new(&[3, -1, 0, 3, 0]);
        assert_eq!(plan.row_order, [2, 4, 0, 3]);
        assert_eq!(plan.starts, [0, 2, 4]);
        assert_eq!(plan.slots, [0, 3]);
    }

    proptest! {
        #[test]
        fn every_row_with_an_adapter_appears_once_under_its_slot(
            slots in prop_oneof![
                prop::collection::vec(-1i32..5, 0..40),
                prop::collection::vec(-1i32..5, 500..700),
            ]
        ) {
            let plan = RowPlan::new(&slots);
            let mut seen = vec![-1; slots.len()];
            for (segment, slot) in plan.slots.iter().enumerate() {
                let (from, to) = (plan.starts[segment] as usize, plan.starts[segment + 1] as usize);
                prop_assert!(from < to);
                for row in &plan.row_order[from..to] {
                    prop_assert_eq!(seen[*row as usize], -1);
                    seen[*row as usize] = *slot;
                }
            }
            prop_assert_eq!(&seen, &slots);
            prop_assert!(plan.idle_rows.iter().all(|row| slots[*row as usize] < 0));
            prop_assert_eq!(plan.idle_rows.len() + plan.row_order.len(), slots.len());
            let mut next = 0;
            for [from, count, slot, _] in &plan.tiles {
                prop_assert!(*from == next && (1..=plan.tile_rows as i32).contains(count));
                next = from + count;
                for row in &plan.row_order[*from as usize..next as usize] {
                    prop_assert_eq!(slots[*row as usize], *slot);
                }
            }
            prop_assert_eq!(next as usize, plan.row_order.len());
            for (rows, ends) in slots.chunks(GROUP_ROWS).zip(plan.group_starts.windows(2)) {
                let listed = &plan.group_slots[ends[0] as usize..ends[1] as usize];
                prop_assert!(listed.windows(2).all(|pair| pair[0] < pair[1]));
                let has = |slot: &i32| rows.contains(slot);
                prop_assert!(listed.iter().all(has));
                prop_assert!(rows.iter().all(|slot| *slot < 0 || listed.contains(slot)));
            }
        }
    }
}
