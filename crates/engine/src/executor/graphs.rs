//! Steps in which every sequence decodes, recorded once for each shape and then replayed.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use lora_core::lora::Spread;
use lora_core::{Backend, Result};

use crate::model::{Decoder, Extents, KvCache, RunState, StepRows};

/// The most rows of a recorded step: above, launches cost little beside the work.
const MAX_ROWS: usize = 256;

/// What one recording is good for. Which adapters the rows have does not matter, only whether there are
/// none, so that batches without adapters do no work for them, few or many, and how rows are tiled.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Shape {
    extents: Extents,
    adapters: (Spread, usize),
}

/// How far a shape is.
enum Recording<G> {
    /// It has run, so that it can be recorded.
    Seen,
    /// It can be replayed.
    Recorded(G),
}

/// Recorded steps and how often they served.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GraphStats {
    /// Steps that were recorded.
    pub recorded: u64,
    /// Steps that were replayed.
    pub replayed: u64,
}

/// The recorded steps of a model.
///
/// A step of a new shape runs eagerly, the next one of that shape is recorded and replayed, later
/// ones are replayed. Backends that record nothing run all of them eagerly.
pub struct StepGraphs<B: Backend> {
    known: HashMap<Shape, Recording<B::Graph>>,
    stats: GraphStats,
    enabled: bool,
}

impl<B: Backend> StepGraphs<B> {
    /// No recorded steps yet; none ever unless `enabled`.
    pub fn new(be: &B, enabled: bool) -> Self {
        let enabled = enabled && be.caps().graphs;
        Self { known: HashMap::new(), stats: GraphStats::default(), enabled }
    }

    /// What was recorded and replayed so far.
    pub fn stats(&self) -> GraphStats {
        self.stats
    }

    /// Brings a step that may be recorded to one of few shapes: rows up to the next size, block
    /// tables up to a power of two.
    pub fn pad(&self, rows: &mut StepRows) {
        if self.enabled && is_decode(&rows.extents()) {
            rows.widen_tables(rows.max_blocks.next_power_of_two());
            rows.pad(padded_rows(rows.ids.len()));
        }
    }

    /// Runs the prepared rows, as [`Decoder::forward`].
    ///
    /// # Errors
    /// Those of the backend.
    pub fn forward(
        &mut self,
        model: &Decoder<B>,
        be: &B,
        q: &mut B::Queue,
        state: &mut RunState<B>,
        kv: &mut KvCache<B>,
    ) -> Result<()> {
        let lora = state.lora();
        let adapters = (lora.spread(), lora.tile_rows());
        let shape = Shape { extents: state.extents(), adapters };
        if !self.enabled || !is_decode(&shape.extents) {
            return model.forward(be, q, state, kv);
        }
        let mut known = match self.known.entry(shape) {
            Entry::Vacant(place) => {
                place.insert(Recording::Seen);
                return model.forward(be, q, state, kv);
            }
            Entry::Occupied(known) => known,
        };
        if let Recording::Seen = known.get()
            && let Some(graph) = be.capture(q, |q| model.forward(be, q, state, kv))?
        {
            known.insert(Recording::Recorded(graph));
            self.stats.recorded += 1;
        }
        if let Recording::Recorded(graph) = known.get() {
            if be.replay(q, graph)? {
                self.stats.replayed += 1;
                return Ok(());
            }
            known.insert(Recording::Seen);
        }
        model.forward(be, q, state, kv)
    }
}

/// Whether each row is a sequence of its own that yields logits.
fn is_decode(of: &Extents) -> bool {
    of.rows == of.logit_rows && of.rows == of.sequences && (1..=MAX_ROWS).contains(&of.rows)
}

/// The rows that a step is padded to: few numbers, so that recordings are few, and not much more
/// than asked for.
pub fn padded_rows(rows: usize) -> usize {
    match rows {
        0..=2 => rows,
        3..=4 => 4,
        5..=64 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_takes_rows_to_few_sizes_and_adds_sequences_without_adapters() {
        assert_eq!([1, 2, 3, 5, 9, 64, 65, 255].map(padded_rows), [1, 2, 4, 8, 16, 64, 96, 256]);
        let mut rows = StepRows {
            ids: vec![5, 6, 7],
            positions: vec![40, 3, 9],
            kv_slots: vec![8, 3, 9],
            sequences: vec![0, 1, 2],
            block_tables: vec![1, 2, 3, 4, 0, 0, 5, 0, 0],
            max_blocks: 3,
            lora_slots: vec![0, -1, 1],
            logit_rows: vec![0, 1, 2],
            drawn: Vec::new(),
        };
        assert!(is_decode(&rows.extents()));
        rows.widen_tables(4);
        rows.pad(4);
        assert_eq!(rows.extents(), Extents { rows: 4, logit_rows: 4, sequences: 4, max_blocks: 4 });
        assert_eq!(rows.block_tables, [1, 2, 3, 0, 4, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((rows.kv_slots[3], rows.lora_slots[3], rows.sequences[3]), (-1, -1, 3));
    }
}
