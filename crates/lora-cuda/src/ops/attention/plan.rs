//! The plan of a step's attention: which rows are prompts, and which block computes which of their tiles.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use bytemuck::cast_slice;
use lora_core::ops::{AttentionArgs, AttentionRows, HeadDims};
use lora_core::{DType, MatLayout, Pool, Result, check, check_extent};

use crate::args::{Address, DeviceMat};
use crate::device::Cuda;
use crate::library::flashinfer::PrefillLists;
use crate::memory::buffer::CudaBuf;
use crate::memory::queue::CudaQueue;

const OP: &str = "plan_attention";

/// Minimum average rows of a prompt: with fewer, tiles would be mostly empty.
const MIN_ROWS: usize = 32;

/// Lists with an entry for each tile.
const LISTS: usize = 6;

/// The fixed cost of a tile, in keys.
const COST_OF_TILE: usize = 256;

/// Rows of a tile of FlashInfer's kernel; `None` for heads that the library has no kernel for.
fn tile_rows(dims: HeadDims) -> Option<usize> {
    match dims.head_dim {
        64 => Some(192),
        128 => Some(128),
        _ => None,
    }
}

/// See [`lora_core::Backend::plan_attention`].
pub struct AttentionPlan {
    dims: HeadDims,
    /// Blocks that share the tiles, one for each multiprocessor.
    blocks: usize,
    /// The most rows of a step.
    capacity: usize,
    lists: CudaBuf,
    rows: usize,
    prompts: Option<Prompts>,
}

/// The planned prompts of a step.
#[derive(Clone, Copy, Debug)]
pub struct Prompts {
    /// Which block computes which tiles.
    pub lists: PrefillLists,
    table_stride: usize,
    /// The last sequence, and the last position of any.
    last: [usize; 2],
    /// Whether there are single rows besides, which are in no tile.
    pub singles: bool,
}

impl AttentionPlan {
    /// The prompts among the rows of an op.
    ///
    /// # Errors
    /// [`lora_core::Error::Shape`] if another number of rows, heads of other extents, or tables of another stride were
    /// planned; [`lora_core::Error::OutOfRange`] for sequences or positions that the tables do not have.
    pub fn prompts(&self, args: &AttentionArgs<'_, Cuda>) -> Result<Option<Prompts>> {
        const OP: &str = "attention";
        let (dims, tables) = (args.dims, args.block_tables.layout);
        check_extent(OP, "rows of the plan", self.rows, args.queries.layout.rows)?;
        check_extent(OP, "heads of the plan", self.dims.heads, dims.heads)?;
        check_extent(OP, "head_dim of the plan", self.dims.head_dim, dims.head_dim)?;
        let Some(prompts) = self.prompts else { return Ok(None) };
        check_extent(OP, "table stride of the plan", prompts.table_stride, tables.row_stride)?;
        let [sequence, position] = prompts.last.map(|last| [last as i32]);
        check::ids(OP, "sequence of the plan", &sequence, tables.rows)?;
        check::ids(OP, "position of the plan", &position, tables.cols * args.tokens_per_block)?;
        Ok(Some(prompts))
    }

    /// Where the lists of `tiles` tiles lie.
    fn places(&self, tiles: usize) -> PrefillLists {
        let word = |at: usize| self.lists.address() + (at * DType::I32.size()) as Address;
        let list = |i: usize| word(self.blocks + 1 + i * tiles);
        PrefillLists {
            block_ends: word(0),
            heads_of: list(0),
            tiles: list(1),
            first_rows: list(2),
            first_blocks: list(3),
            rows_of: list(4),
            keys_of: list(5),
        }
    }
}

/// See [`lora_core::Backend::attention_plan`].
pub fn attention_plan(cuda: &Cuda, dims: HeadDims, capacity: usize) -> Result<AttentionPlan> {
    let blocks = cuda.multiprocessors;
    let max_tiles = tile_rows(dims)
        .map_or(0, |rows| dims.heads * (capacity.div_ceil(rows) + capacity.div_ceil(MIN_ROWS)));
    let bytes = (blocks + 1 + LISTS * max_tiles) * DType::I32.size();
    let lists = CudaBuf::zeroed(&cuda.context, Pool::StepInputs, bytes)?;
    Ok(AttentionPlan { dims, blocks, capacity, lists, rows: 0, prompts: None })
}

/// See [`lora_core::Backend::plan_attention`].
pub fn plan_attention(
    q: &mut CudaQueue,
    of: AttentionRows<'_>,
    plan: &mut AttentionPlan,
) -> Result<()> {
    let rows = of.positions.len();
    check_extent(OP, "sequences of rows", of.sequences.len(), rows)?;
    check::plan_room(OP, rows, plan.capacity)?;
    (plan.rows, plan.prompts) = (rows, None);
    let Some(of_tile) = tile_rows(plan.dims) else { return Ok(()) };
    let Some((prompts, singles)) = prompts(&runs(&of)) else { return Ok(()) };
    let tiles = tiles(&prompts, plan.dims.heads, of_tile);
    let words = lists(&assign(&tiles, plan.blocks), of.table_stride);
    let layout = MatLayout::dense(1, words.len(), DType::I32);
    q.upload(cast_slice(&words), DeviceMat::new(&plan.lists, layout))?;
    let max = |number: fn(&Run) -> usize| prompts.iter().map(number).max().unwrap_or(0);
    plan.prompts = Some(Prompts {
        lists: plan.places(tiles.len()),
        table_stride: of.table_stride,
        last: [max(|run| run.sequence), max(|run| run.keys - 1)],
        singles,
    });
    Ok(())
}

/// Neighbouring rows of one sequence at neighbouring positions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Run {
    first_row: usize,
    rows: usize,
    sequence: usize,
    /// Positions of the sequence up to the run's end.
    keys: usize,
}

/// The longest runs of the rows. Negative numbers count as 0 here; a device that checks numbers refuses them in the
/// op.
fn runs(of: &AttentionRows<'_>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let index = |number: &i32| usize::try_from(*number).unwrap_or(0);
    for (row, (sequence, position)) in of.sequences.iter().zip(of.positions).enumerate() {
        let (sequence, position) = (index(sequence), index(position));
        match runs.last_mut() {
            Some(run) if run.sequence == sequence && run.keys == position => {
                (run.rows, run.keys) = (run.rows + 1, run.keys + 1);
            }
            _ => runs.push(Run { first_row: row, rows: 1, sequence, keys: position + 1 }),
        }
    }
    runs
}

/// The runs of several rows, if they are worth tiles, and whether there are single rows besides.
fn prompts(runs: &[Run]) -> Option<(Vec<Run>, bool)> {
    // The decode kernel would not take a row for single that stands beside others of its sequence.
    if runs.windows(2).any(|pair| pair[0].sequence == pair[1].sequence) {
        return None;
    }
    let (prompts, singles): (Vec<Run>, Vec<Run>) = runs.iter().partition(|run| run.rows > 1);
    let rows: usize = prompts.iter().map(|run| run.rows).sum();
    let worth = !prompts.is_empty() && rows >= MIN_ROWS * prompts.len();
    worth.then_some((prompts, !singles.is_empty()))
}

/// A tile of a run for one query head.
#[derive(Clone, Copy, Debug)]
struct PromptTile {
    run: Run,
    head: usize,
    number: usize,
    /// Keys that its last row attends to.
    keys: usize,
}

/// All tiles, those with most keys first.
fn tiles(prompts: &[Run], heads: usize, of_tile: usize) -> Vec<PromptTile> {
    let of_run = |run: &Run| {
        let run = *run;
        (0..run.rows.div_ceil(of_tile)).flat_map(move |number| {
            let behind = run.rows.saturating_sub((number + 1) * of_tile);
            (0..heads).map(move |head| PromptTile { run, head, number, keys: run.keys - behind })
        })
    };
    let mut tiles: Vec<PromptTile> = prompts.iter().flat_map(of_run).collect();
    tiles.sort_by_key(|tile| Reverse(tile.keys));
    tiles
}

/// The tiles of each block: each tile goes to the block with least to do so far.
fn assign(tiles: &[PromptTile], blocks: usize) -> Vec<Vec<PromptTile>> {
    let mut of_blocks = vec![Vec::new(); blocks];
    let mut loads: BinaryHeap<_> = (0..blocks).map(|block| Reverse((0, block))).collect();
    for tile in tiles {
        if let Some(mut least) = loads.peek_mut() {
            let Reverse((load, block)) = &mut *least;
            of_blocks[*block].push(*tile);
            *load += tile.keys + COST_OF_TILE;
        }
    }
    of_blocks
}

/// The words of the lists of `library.h`: where blocks end, then list after list.
fn lists(of_blocks: &[Vec<PromptTile>], table_stride: usize) -> Vec<i32> {
    let mut end = 0;
    let ends = of_blocks.iter().map(|tiles| {
        end += tiles.len();
        end as i32
    });
    let mut words: Vec<i32> = std::iter::once(0).chain(ends).collect();
    let entries: [fn(&PromptTile, usize) -> usize; LISTS] = [
        |tile, _| tile.head,
        |tile, _| tile.number,
        |tile, _| tile.run.first_row,
        |tile, table_stride| tile.run.sequence * table_stride,
        |tile, _| tile.run.rows,
        |tile, _| tile.run.keys,
    ];
    for entry in entries {
        words.extend(of_blocks.iter().flatten().map(|tile| entry(tile, table_stride) as i32));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows_of(lengths: &[(i32, std::ops::Range<i32>)]) -> (Vec<i32>, Vec<i32>) {
        lengths.iter().flat_map(|(s, positions)| positions.clone().map(|p| (*s, p))).unzip()
    }

    #[test]
    fn prompts_are_runs_of_many_rows_beside_single_ones() {
        let found = |lengths: &[_]| {
            let (sequences, positions) = rows_of(lengths);
            let rows =
                AttentionRows { sequences: &sequences, positions: &positions, table_stride: 7 };
            prompts(&runs(&rows))
        };
        let first = Run { first_row: 0, rows: 40, sequence: 3, keys: 140 };
        let second = Run { first_row: 41, rows: 64, sequence: 0, keys: 64 };
        assert_eq!(
            found(&[(3, 100..140), (1, 9..10), (0, 0..64)]),
            Some((vec![first, second], true))
        );
        assert_eq!(found(&[(3, 100..140)]), Some((vec![first], false)));
        // Short ones, only single ones, and rows that skip positions or come twice.
        for lengths in [
            &[(0, 0..40), (1, 0..20)][..],
            &[(0, 5..6), (1, 7..8)],
            &[(0, 0..40), (0, 50..90)],
            &[(0, 0..40), (0, 39..40)],
            &[],
        ] {
            assert_eq!(found(lengths), None, "{lengths:?}");
        }
    }

    #[test]
    fn every_tile_is_listed_once_and_blocks_have_alike_loads() {
        let prompts = [
            Run { first_row: 0, rows: 300, sequence: 2, keys: 1000 },
            Run { first_row: 300, rows: 128, sequence: 0, keys: 128 },
        ];
        let all = tiles(&prompts, 4, 128);
        assert_eq!(all.len(), 4 * (3 + 1));
        let keys: Vec<usize> = all.iter().step_by(4).map(|tile| tile.keys).collect();
        assert_eq!(keys, [1000, 956, 828, 128]);
        let of_blocks = assign(&all, 5);
        let load =
            |tiles: &Vec<PromptTile>| tiles.iter().map(|t| t.keys + COST_OF_TILE).sum::<usize>();
        let (least, most) =
            (of_blocks.iter().map(load).min().unwrap(), of_blocks.iter().map(load).max().unwrap());
        assert!(most - least <= 1000 + COST_OF_TILE, "{least} to {most}");
        let words = lists(&of_blocks, 10);
        assert_eq!(words.len(), 6 + LISTS * 16);
        assert_eq!((words[0], words[5]), (0, 16));
        let list = |i: usize| &words[6 + 16 * i..6 + 16 * (i + 1)];
        let mut listed: Vec<(i32, i32, i32)> =
            (0..16).map(|i| (list(2)[i], list(0)[i], list(1)[i])).collect();
        listed.sort_unstable();
        let expected: Vec<(i32, i32, i32)> = [(0, 3), (300, 1)]
            .into_iter()
            .flat_map(|(first, tiles)| {
                (0..4).flat_map(move |h| (0..tiles).map(move |t| (first, h, t)))
            })
            .collect();
        assert_eq!(listed, expected);
        for i in 0..16 {
            let expected = if list(2)[i] == 0 { (20, 300, 1000) } else { (0, 128, 128) };
            assert_eq!((list(3)[i], list(4)[i], list(5)[i]), expected);
        }
    }
}
