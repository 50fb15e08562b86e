//! The rows of a step sorted by adapter. Nothing here touches a device.

/// Rows of a group: kernels that take neighbouring rows together find the slots of such a group listed.
pub const GROUP_ROWS: usize = 256;

/// Minimum rows with an adapter for tiles of 32 rows: fewer would not keep the device busy.
const MIN_ROWS_FOR_LARGE_TILES: usize = 128;

/// Minimum average rows of an adapter for tiles of 32 rows: fewer would leave them less than half full.
const MIN_ROWS_PER_ADAPTER: usize = 16;

/// Tiles up to which adapters count as few, whatever the number of rows.
const MAX_FEW_TILES: usize = 16;

/// Rows of a tile on average from which on adapters count as few.
const MIN_AVERAGE_TILE: usize = 4;

/// Rows of a tile: as many rows of one adapter as share a read of its factors.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum TileSize {
    /// 8 rows, where adapters have few, as when sequences decode.
    #[default]
    Small,
    /// 32 rows.
    Large,
}

impl TileSize {
    /// The tile for `rows` rows that `adapters` adapters have.
    fn choose(rows: usize, adapters: usize) -> Self {
        if rows >= MIN_ROWS_FOR_LARGE_TILES && rows >= MIN_ROWS_PER_ADAPTER * adapters {
            Self::Large
        } else {
            Self::Small
        }
    }

    /// Rows of a full tile.
    pub const fn rows(self) -> usize {
        match self {
            Self::Small => 8,
            Self::Large => 32,
        }
    }
}

/// How many adapters the rows of a step have.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Spread {
    /// None.
    #[default]
    None,
    /// So few that most have several rows, or that there are few rows.
    Few,
    /// About one for each row.
    Many,
}

/// What the choice of kernels for a step depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StepShape {
    /// Rows, those without an adapter included.
    pub rows: usize,
    /// How rows are tiled.
    pub tile: TileSize,
    /// How many adapters the rows have.
    pub spread: Spread,
    /// Adapters.
    pub segments: usize,
    /// Adapters of all groups of [`GROUP_ROWS`] rows together.
    pub group_slots: usize,
}

impl StepShape {
    /// The most adapters of a step with as many rows and the same tiles: what a recorded step may find when it is
    /// replayed.
    pub fn max_segments(&self) -> usize {
        match self.tile {
            TileSize::Small => self.rows,
            TileSize::Large => self.rows / MIN_ROWS_PER_ADAPTER,
        }
    }
}

/// The rows of a step grouped by the slot of their adapter; rows without an adapter are left out.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Segments {
    /// Rows that have an adapter, those of one slot side by side, in ascending order in a slot.
    pub row_order: Vec<i32>,
    /// Start of each segment of `row_order`, then its length; empty when there are no segments.
    pub starts: Vec<i32>,
    /// Slot of each segment, ascending.
    pub slots: Vec<i32>,
    /// Segments cut into tiles: first entry in `row_order`, number of entries, slot, and 0.
    pub tiles: Vec<[i32; 4]>,
    /// Rows that have no adapter, in ascending order.
    pub idle_rows: Vec<i32>,
    /// Slot of each row, negative where there is no adapter.
    pub slot_of_row: Vec<i32>,
    /// Of each group of [`GROUP_ROWS`] neighbouring rows: where its slots begin in `group_slots`; then their number.
    pub group_starts: Vec<i32>,
    /// Slots that rows of a group have, ascending in each group.
    pub group_slots: Vec<i32>,
    /// Rows of a tile.
    pub tile: TileSize,
}

impl Segments {
    /// Groups rows by slot; `slot_of_row[i] < 0` means that row `i` has no adapter.
    pub fn new(slot_of_row: &[i32]) -> Self {
        let idle = slot_of_row.iter().zip(0..).filter(|(slot, _)| **slot < 0);
        let mut segments = Self {
            idle_rows: idle.map(|(_, row)| row).collect(),
            slot_of_row: slot_of_row.to_vec(),
            ..Self::default()
        };
        segments.sort_rows();
        segments.list_groups();
        segments.tile = TileSize::choose(segments.row_order.len(), segments.slots.len());
        segments.tiles = segments.cut(segments.tile.rows() as i32);
        segments
    }

    /// What the choice of kernels depends on.
    pub fn shape(&self) -> StepShape {
        StepShape {
            rows: self.slot_of_row.len(),
            tile: self.tile,
            spread: self.spread(),
            segments: self.slots.len(),
            group_slots: self.group_slots.len(),
        }
    }

    fn spread(&self) -> Spread {
        match self.tiles.len() {
            0 => Spread::None,
            1..=MAX_FEW_TILES => Spread::Few,
            tiles if tiles * MIN_AVERAGE_TILE <= self.slot_of_row.len() => Spread::Few,
            _ => Spread::Many,
        }
    }

    fn sort_rows(&mut self) {
        let rows = self.slot_of_row.iter().copied().zip(0..);
        let mut rows: Vec<(i32, i32)> = rows.filter(|(slot, _)| *slot >= 0).collect();
        rows.sort_unstable();
        for chunk in rows.chunk_by(|a, b| a.0 == b.0) {
            self.slots.push(chunk[0].0);
            self.starts.push(self.row_order.len() as i32);
            self.row_order.extend(chunk.iter().map(|(_, row)| row));
        }
        if !self.slots.is_empty() {
            self.starts.push(self.row_order.len() as i32);
        }
    }

    /// Lists the slots of each group of rows.
    fn list_groups(&mut self) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_without_an_adapter_are_left_out() {
        for rows in [&[-1, -1][..], &[]] {
            let found = Segments::new(rows);
            assert!(found.row_order.is_empty() && found.starts.is_empty());
            assert!(found.tiles.is_empty());
            assert_eq!(found.shape().spread, Spread::None);
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
            let found = Segments::new(&in_turn(rows, adapters)).shape();
            assert_eq!(found.spread, spread, "{rows} {adapters}");
        }
    }

    #[test]
    fn large_tiles_are_for_many_rows_of_few_adapters() {
        for (rows, adapters, tile) in [
            (127, 1, TileSize::Small),
            (128, 8, TileSize::Large),
            (128, 9, TileSize::Small),
            (1600, 100, TileSize::Large),
            (1599, 100, TileSize::Small),
        ] {
            assert_eq!(TileSize::choose(rows, adapters), tile, "{rows} {adapters}");
        }
    }

    #[test]
    fn rows_of_one_slot_stand_together() {
        let found = Segments::new(&[3, -1, 0, 3, 0]);
        assert_eq!(found.row_order, [2, 4, 0, 3]);
        assert_eq!(found.starts, [0, 2, 4]);
        assert_eq!(found.slots, [0, 3]);
    }

    proptest! {
        #[test]
        fn every_row_with_an_adapter_appears_once_under_its_slot(
            slots in prop_oneof![
                prop::collection::vec(-1i32..5, 0..40),
                prop::collection::vec(-1i32..5, 500..700),
            ]
        ) {
            let found = Segments::new(&slots);
            let mut seen = vec![-1; slots.len()];
            for (segment, slot) in found.slots.iter().enumerate() {
                let ends = &found.starts[segment..segment + 2];
                let (from, to) = (ends[0] as usize, ends[1] as usize);
                prop_assert!(from < to);
                for row in &found.row_order[from..to] {
                    prop_assert_eq!(seen[*row as usize], -1);
                    seen[*row as usize] = *slot;
                }
            }
            prop_assert_eq!(&seen, &slots);
            prop_assert!(found.idle_rows.iter().all(|row| slots[*row as usize] < 0));
            prop_assert_eq!(found.idle_rows.len() + found.row_order.len(), slots.len());
            prop_assert!(found.slots.len() <= found.shape().max_segments());
            let mut next = 0;
            for [from, count, slot, _] in &found.tiles {
                prop_assert!(*from == next && (1..=found.tile.rows() as i32).contains(count));
                next = from + count;
                for row in &found.row_order[*from as usize..next as usize] {
                    prop_assert_eq!(slots[*row as usize], *slot);
                }
            }
            prop_assert_eq!(next as usize, found.row_order.len());
            for (rows, ends) in slots.chunks(GROUP_ROWS).zip(found.group_starts.windows(2)) {
                let listed = &found.group_slots[ends[0] as usize..ends[1] as usize];
                prop_assert!(listed.windows(2).all(|pair| pair[0] < pair[1]));
                let has = |slot: &i32| rows.contains(slot);
                prop_assert!(listed.iter().all(has));
                prop_assert!(rows.iter().all(|slot| *slot < 0 || listed.contains(slot)));
            }
        }
    }
}
