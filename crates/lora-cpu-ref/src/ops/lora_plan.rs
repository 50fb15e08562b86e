//! Rows of a step by adapter.

use lora_core::lora::LoraPlan;
use lora_core::{Result, check};

/// Which adapter each row of a step has, and the rows of each adapter.
pub struct CpuLoraPlan {
    slot_of_row: Vec<i32>,
    segments: Vec<Segment>,
    capacity: usize,
}

/// The rows of one adapter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    /// The adapter's slot.
    pub slot: i32,
    /// Its rows, ascending.
    pub rows: Vec<u32>,
}

impl CpuLoraPlan {
    /// A plan of no rows, with room for `capacity`.
    pub fn new(capacity: usize) -> Self {
        Self { slot_of_row: Vec::new(), segments: Vec::new(), capacity }
    }

    /// See [`lora_core::Backend::plan_lora`].
    pub fn fill(&mut self, slots: &[i32]) -> Result<()> {
        check::plan_room("plan_lora", slots.len(), self.capacity)?;
        self.slot_of_row = slots.to_vec();
        self.segments = segments(slots);
        Ok(())
    }

    /// Slot of each row, negative where it has no adapter.
    pub fn slot_of_row(&self) -> &[i32] {
        &self.slot_of_row
    }

    /// The rows of each adapter, by slot.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

impl LoraPlan for CpuLoraPlan {
    type Key = ();

    fn rows(&self) -> usize {
        self.slot_of_row.len()
    }

    fn has_adapters(&self) -> bool {
        !self.segments.is_empty()
    }

    fn key(&self) {}
}

fn segments(slots: &[i32]) -> Vec<Segment> {
    let mut rows: Vec<(i32, u32)> =
        slots.iter().copied().zip(0..).filter(|(slot, _)| *slot >= 0).collect();
    rows.sort_unstable();
    let segment = |rows: &[(i32, u32)]| Segment {
        slot: rows[0].0,
        rows: rows.iter().map(|(_, row)| *row).collect(),
    };
    rows.chunk_by(|a, b| a.0 == b.0).map(segment).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_of_one_slot_stand_together() {
        let found = segments(&[3, -1, 0, 3, 0]);
        let expected = [(0, vec![2, 4]), (3, vec![0, 3])];
        assert_eq!(found, expected.map(|(slot, rows)| Segment { slot, rows }));
    }

    #[test]
    fn a_plan_is_that_of_the_last_step_and_takes_no_more_rows_than_there_is_room_for() {
        let mut plan = CpuLoraPlan::new(3);
        assert!(plan.rows() == 0 && !plan.has_adapters());
        plan.fill(&[0, 1, 0]).unwrap();
        assert!(plan.rows() == 3 && plan.has_adapters());
        plan.fill(&[-1, -2]).unwrap();
        assert!(plan.rows() == 2 && !plan.has_adapters());
        let error = plan.fill(&[0; 4]).unwrap_err().to_string();
        assert!(error.contains('4') && error.contains('3'), "{error}");
    }

    proptest! {
        #[test]
        fn every_row_with_an_adapter_appears_once_under_its_slot(
            slots in prop::collection::vec(-1i32..5, 0..40)
        ) {
            let mut seen = vec![-1; slots.len()];
            for Segment { slot, rows } in segments(&slots) {
                prop_assert!(rows.windows(2).all(|pair| pair[0] < pair[1]));
                for row in rows {
                    prop_assert_eq!(seen[row as usize], -1);
                    seen[row as usize] = slot;
                }
            }
            prop_assert_eq!(seen, slots);
        }
    }
}
