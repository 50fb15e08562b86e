//! Which adapter each row of a step uses, sorted once and shared by all layers.

use bytemuck::cast_slice;

use crate::{Backend, DType, Pool, Result, Tensor};

/// Rows of a batch grouped by the slot of their adapter; rows without an adapter are left out.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RowPlan {
    /// Rows that have an adapter, those of one slot side by side, in ascending order in a slot.
    pub row_order: Vec<i32>,
    /// Start of each segment of `row_order`, then its length; empty when there are no segments.
    pub starts: Vec<i32>,
    /// Slot of each segment, ascending.
    pub slots: Vec<i32>,
    /// Segments cut into tiles of up to [`RowPlan::tile_rows`] rows, for kernels that share an
    /// adapter's factors among them: first entry in `row_order`, number of entries, slot, and 0.
    pub tiles: Vec<[i32; 4]>,
    /// Rows of a full tile.
    pub tile_rows: usize,
}

/// Rows of a tile where adapters have few rows, as when sequences decode, and where they have many.
const TILE_ROWS: [usize; 2] = [8, 32];

/// Rows from which on large tiles keep a device busy, and rows an adapter that fill half of one.
const MANY_ROWS: [usize; 2] = [512, 16];

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
        let mut plan = Self::default();
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

/// A [`RowPlan`] in device memory, at fixed addresses that are refilled for each step.
pub struct LoraBatch<B: Backend> {
    /// Row order of the plan: `[1, capacity]` i32.
    pub row_order: Tensor<B>,
    /// Segment starts: `[1, capacity + 1]` i32.
    pub starts: Tensor<B>,
    /// Slot of each segment: `[1, capacity]` i32.
    pub slots: Tensor<B>,
    /// Tiles of the plan: `[1, 4 * capacity]` i32.
    pub tiles: Tensor<B>,
    /// Number of segments, of rows in the row order, and of tiles: `[1, 3]` i32. A recorded step
    /// reads it where it cannot know [`LoraBatch::segments`].
    pub sizes: Tensor<B>,
    /// Rows of a full tile.
    pub tile_rows: usize,
    /// Number of segments of the current step.
    pub segments: usize,
}

impl<B: Backend> LoraBatch<B> {
    /// Room for `capacity` rows; empty until [`LoraBatch::fill`].
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(be: &B, capacity: usize) -> Result<Self> {
        let array = |cols| Tensor::zeros(be, Pool::StepInputs, 1, cols, DType::I32);
        Ok(Self {
            row_order: array(capacity)?,
            starts: array(capacity + 1)?,
            slots: array(capacity)?,
            tiles: array(4 * capacity)?,
            sizes: array(3)?,
            tile_rows: TILE_ROWS[0],
            segments: 0,
        })
    }

    /// Uploads the plan of a step.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    ///
    /// # Panics
    /// If the plan has more rows than the capacity.
    pub fn fill(&mut self, be: &B, q: &mut B::Queue, plan: &RowPlan) -> Result<()> {
        self.segments = plan.slots.len();
        self.tile_rows = plan.tile_rows;
        let sizes = [plan.slots.len(), plan.row_order.len(), plan.tiles.len()].map(|n| n as i32);
        for (tensor, values) in [
            (&mut self.row_order, &plan.row_order[..]),
            (&mut self.starts, &plan.starts),
            (&mut self.slots, &plan.slots),
            (&mut self.tiles, plan.tiles.as_flattened()),
            (&mut self.sizes, &sizes),
        ] {
            let mut view = tensor.view_mut();
            view.geo = view.geo.slice_cols(0..values.len());
            be.upload(q, cast_slice(values), view)?;
        }
        Ok(())
    }
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
            let mut next = 0;
            for [from, count, slot, _] in &plan.tiles {
                prop_assert!(*from == next && (1..=plan.tile_rows as i32).contains(count));
                next = from + count;
                for row in &plan.row_order[*from as usize..next as usize] {
                    prop_assert_eq!(slots[*row as usize], *slot);
                }
            }
            prop_assert_eq!(next as usize, plan.row_order.len());
        }
    }
}
