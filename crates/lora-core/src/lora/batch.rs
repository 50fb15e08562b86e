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
        let mut plan = Self::default();
        for chunk in rows.chunk_by(|a, b| a.0 == b.0) {
            plan.slots.push(chunk[0].0);
            plan.starts.push(plan.row_order.len() as i32);
            plan.row_order.extend(chunk.iter().map(|(_, row)| row));
        }
        if !plan.slots.is_empty() {
            plan.starts.push(plan.row_order.len() as i32);
        }
        plan
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
    /// Number of segments, and of rows in the row order: `[1, 2]` i32. A recorded step reads it
    /// where it cannot know [`LoraBatch::segments`].
    pub sizes: Tensor<B>,
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
            sizes: array(2)?,
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
        let sizes = vec![plan.slots.len() as i32, plan.row_order.len() as i32];
        for (tensor, values) in [
            (&mut self.row_order, &plan.row_order),
            (&mut self.starts, &plan.starts),
            (&mut self.slots, &plan.slots),
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
        assert_eq!(RowPlan::new(&[-1, -1]), RowPlan::default());
        assert_eq!(RowPlan::new(&[]), RowPlan::default());
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
            slots in prop::collection::vec(-1i32..5, 0..40)
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
            prop_assert_eq!(seen, slots);
        }
    }
}
