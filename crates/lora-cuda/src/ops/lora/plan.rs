//! The plan of a step's adapters, in device memory.

use std::ops::Range;

use bytemuck::cast_slice;
use lora_core::lora::LoraPlan;
use lora_core::{DType, MatLayout, Pool, Result, check};

use super::segments::{GROUP_ROWS, Segments, Spread, StepShape, TileSize};
use crate::args::DeviceMat;
use crate::device::Cuda;
use crate::memory::buffer::CudaBuf;
use crate::memory::queue::CudaQueue;

/// See [`lora_core::Backend::plan_lora`]. It is refilled in place for each step. Where its parts lie depends on the
/// number of rows alone, so that a recorded step finds them in the same places when it is replayed.
pub struct CudaLoraPlan {
    words: CudaBuf,
    capacity: usize,
    shape: StepShape,
}

/// What a recorded step takes for granted of a plan besides its rows: kernels were chosen by it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CudaLoraKey {
    spread: Spread,
    tile: TileSize,
}

/// The parts of a plan, each a row of i32; see [`Segments`].
#[derive(Clone, Copy, Debug)]
pub struct PlanArrays<T> {
    /// `[1, 4 * rows]`. Tiles come first, as they are read 16 bytes at a time.
    pub tiles: T,
    /// Number of segments, of rows in the row order, and of tiles: `[1, 3]`. A recorded step reads them on the
    /// device, as the host does not know them when it records.
    pub sizes: T,
    /// `[1, rows]`.
    pub row_order: T,
    /// `[1, rows + 1]`.
    pub starts: T,
    /// `[1, rows]`.
    pub slots: T,
    /// `[1, rows]`.
    pub idle_rows: T,
    /// `[1, rows]`.
    pub slot_of_row: T,
    /// `[1, groups + 1]`.
    pub group_starts: T,
    /// `[1, rows]`.
    pub group_slots: T,
}

impl PlanArrays<Range<usize>> {
    /// Where the parts of a plan of `rows` rows lie, in words, and the end of the last.
    fn of(rows: usize) -> (Self, usize) {
        let mut end = 0;
        let mut next = |words| {
            let start = end;
            end += words;
            start..end
        };
        let parts = Self {
            tiles: next(4 * rows),
            sizes: next(3),
            row_order: next(rows),
            starts: next(rows + 1),
            slots: next(rows),
            idle_rows: next(rows),
            slot_of_row: next(rows),
            group_starts: next(rows.div_ceil(GROUP_ROWS) + 1),
            group_slots: next(rows),
        };
        (parts, end)
    }
}

/// See [`lora_core::Backend::lora_plan`].
pub fn lora_plan(cuda: &Cuda, capacity: usize) -> Result<CudaLoraPlan> {
    let (_, words) = PlanArrays::of(capacity);
    let words = CudaBuf::zeroed(&cuda.context, Pool::StepInputs, words * DType::I32.size())?;
    Ok(CudaLoraPlan { words, capacity, shape: StepShape::default() })
}

/// See [`lora_core::Backend::plan_lora`].
pub fn plan_lora(q: &mut CudaQueue, slots: &[i32], plan: &mut CudaLoraPlan) -> Result<()> {
    check::plan_room("plan_lora", slots.len(), plan.capacity)?;
    let segments = Segments::new(slots);
    let words = words_of(&segments);
    let layout = MatLayout::dense(1, words.len(), DType::I32);
    q.upload(cast_slice(&words), DeviceMat::new(&plan.words, layout))?;
    plan.shape = segments.shape();
    Ok(())
}

/// All parts, each in its place.
fn words_of(segments: &Segments) -> Vec<i32> {
    let (parts, end) = PlanArrays::of(segments.slot_of_row.len());
    let sizes = [segments.slots.len(), segments.row_order.len(), segments.tiles.len()];
    let mut words = vec![0; end];
    let mut write = |place: Range<usize>, part: &[i32]| {
        words[place][..part.len()].copy_from_slice(part);
    };
    write(parts.tiles, segments.tiles.as_flattened());
    write(parts.sizes, &sizes.map(|size| size as i32));
    write(parts.row_order, &segments.row_order);
    write(parts.starts, &segments.starts);
    write(parts.slots, &segments.slots);
    write(parts.idle_rows, &segments.idle_rows);
    write(parts.slot_of_row, &segments.slot_of_row);
    write(parts.group_starts, &segments.group_starts);
    write(parts.group_slots, &segments.group_slots);
    words
}

impl CudaLoraPlan {
    /// What the choice of kernels depends on.
    pub(crate) fn shape(&self) -> StepShape {
        self.shape
    }

    /// The parts of the plan of the current step.
    pub(crate) fn parts(&self) -> PlanArrays<DeviceMat> {
        let (parts, end) = PlanArrays::of(self.shape.rows);
        let words = MatLayout::dense(1, end, DType::I32);
        let part = |place| DeviceMat::new(&self.words, words.slice_cols(place));
        PlanArrays {
            tiles: part(parts.tiles),
            sizes: part(parts.sizes),
            row_order: part(parts.row_order),
            starts: part(parts.starts),
            slots: part(parts.slots),
            idle_rows: part(parts.idle_rows),
            slot_of_row: part(parts.slot_of_row),
            group_starts: part(parts.group_starts),
            group_slots: part(parts.group_slots),
        }
    }
}

impl LoraPlan for CudaLoraPlan {
    type Key = CudaLoraKey;

    fn rows(&self) -> usize {
        self.shape.rows
    }

    fn has_adapters(&self) -> bool {
        self.shape.segments > 0
    }

    fn key(&self) -> CudaLoraKey {
        CudaLoraKey { spread: self.shape.spread, tile: self.shape.tile }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_hold_every_part_in_its_place() {
        let segments = Segments::new(&[3, -1, 0, 3, 0]);
        let words = words_of(&segments);
        let (parts, end) = PlanArrays::of(5);
        assert_eq!(words.len(), end);
        assert_eq!(words[parts.tiles][..8], [0, 2, 0, 0, 2, 2, 3, 0]);
        assert_eq!(words[parts.sizes], [2, 4, 2]);
        assert_eq!(words[parts.row_order], [2, 4, 0, 3, 0]);
        assert_eq!(words[parts.starts], [0, 2, 4, 0, 0, 0]);
        assert_eq!(words[parts.slots], [0, 3, 0, 0, 0]);
        assert_eq!(words[parts.idle_rows], [1, 0, 0, 0, 0]);
        assert_eq!(words[parts.slot_of_row], [3, -1, 0, 3, 0]);
        assert_eq!(words[parts.group_starts], [0, 2]);
        assert_eq!(words[parts.group_slots], [0, 3, 0, 0, 0]);
    }

    #[test]
    fn the_largest_plan_has_room_for_every_smaller_one() {
        let end = |rows| PlanArrays::of(rows).1;
        assert!((1..2000).all(|rows| end(rows - 1) < end(rows)));
    }
}
