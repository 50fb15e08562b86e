//! CUDA graphs of pure decode steps: recorded once for each shape, then replayed.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use lora_core::lora::LoraPlan;
use lora_core::{Backend, Result};

use crate::model::{Decoder, Extents, KvCache, RunState, StepRows};

/// Most rows of a recorded step. In larger steps launch overhead is small beside the computation.
const MAX_ROWS: usize = 256;

/// Batch sizes for which decode steps are recorded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GraphSizes {
    /// Ascending; `None`: the sizes of [`padded_rows`].
    sizes: Option<Vec<usize>>,
    /// The largest.
    max: usize,
    /// Whether steps of other sizes are padded to the next one.
    padding: bool,
}

impl GraphSizes {
    /// Records steps of these `sizes` (`None`: those of [`padded_rows`]), up to `max` rows, for which the
    /// step's buffers must have room. With `padding`, other steps are padded to the next size.
    pub fn new(sizes: Option<&[usize]>, max: usize, padding: bool) -> Self {
        let max = max.min(MAX_ROWS);
        let sizes = sizes.map(|sizes| {
            let mut sizes: Vec<usize> = sizes.iter().copied().filter(|size| *size <= max).collect();
            sizes.sort_unstable();
            sizes
        });
        Self { sizes, max, padding }
    }

    /// The padded size at which a step of `rows` rows is recorded; `None`: it runs eagerly.
    fn recorded(&self, rows: usize) -> Option<usize> {
        let fits = |size: &usize| if self.padding { *size >= rows } else { *size == rows };
        match &self.sizes {
            Some(sizes) => sizes.iter().copied().find(fits),
            None if self.padding => (rows <= self.max).then(|| padded_rows(rows).min(self.max)),
            None => Some(rows).filter(|rows| *rows <= self.max),
        }
    }
}

/// Key of a recording. Which adapters the rows have is not part of it, only whether any row has one, so that
/// batches of the base model alone do no LoRA work, and the key of the backend's LoRA plan.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct GraphKey<K> {
    extents: Extents,
    has_adapters: bool,
    lora: K,
}

/// The shape of a backend's steps.
type GraphKeyOf<B> = GraphKey<<<B as Backend>::LoraPlan as LoraPlan>::Key>;

/// State of the graph of one shape.
enum Recording<G> {
    /// The shape has run eagerly once, so that it can be recorded.
    Seen,
    /// The recorded graph, which can be replayed.
    Recorded(G),
}

/// Counts of recorded graphs and of their replays.
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
    known: HashMap<GraphKeyOf<B>, Recording<B::Graph>>,
    stats: GraphStats,
    /// `None`: nothing is recorded.
    sizes: Option<GraphSizes>,
}

impl<B: Backend> StepGraphs<B> {
    /// No recorded steps yet; none ever without `sizes`, or where the backend records nothing.
    pub fn new(be: &B, sizes: Option<GraphSizes>) -> Self {
        let sizes = sizes.filter(|_| be.caps().graphs);
        Self { known: HashMap::new(), stats: GraphStats::default(), sizes }
    }

    /// Counts of recorded graphs and replays so far.
    pub fn stats(&self) -> GraphStats {
        self.stats
    }

    /// Brings a step that may be recorded to one of few shapes: rows up to the next size, block
    /// tables up to a power of two.
    pub fn pad(&self, rows: &mut StepRows) {
        if let Some(padded) = self.recorded(&rows.extents()) {
            rows.widen_tables(rows.max_blocks.next_power_of_two());
            rows.pad(padded);
        }
    }

    /// The padded number of rows at which a step is recorded; `None`: it runs eagerly.
    fn recorded(&self, step: &Extents) -> Option<usize> {
        self.sizes.as_ref().filter(|_| is_decode(step))?.recorded(step.rows)
    }

    /// Runs the prepared rows, as [`Decoder::forward`].
    ///
    /// # Errors
    /// Errors of the backend.
    pub fn forward(
        &mut self,
        model: &Decoder<B>,
        be: &B,
        q: &mut B::Queue,
        state: &mut RunState<B>,
        kv: &mut KvCache<B>,
    ) -> Result<()> {
        let lora = state.lora();
        let (extents, has_adapters) = (state.extents(), lora.has_adapters());
        let shape = GraphKey { extents, has_adapters, lora: lora.key() };
        if self.recorded(&shape.extents) != Some(shape.extents.rows) {
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

/// Whether this is a pure decode step: each row is a sequence of its own and yields logits.
fn is_decode(of: &Extents) -> bool {
    of.rows == of.logit_rows && of.rows == of.sequences && of.rows > 0
}

/// The batch size to which a decode step is padded. Coarse enough that few graphs are recorded, fine
/// enough that little is computed in vain.
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
    fn steps_are_recorded_at_the_configured_sizes() {
        let of = |sizes: Option<&[usize]>, max, padding| {
            let sizes = GraphSizes::new(sizes, max, padding);
            [1, 3, 4, 60, 250, 300].map(|rows| sizes.recorded(rows))
        };
        assert_eq!(
            of(None, usize::MAX, true),
            [Some(1), Some(4), Some(4), Some(64), Some(256), None]
        );
        assert_eq!(
            of(None, usize::MAX, false),
            [Some(1), Some(3), Some(4), Some(60), Some(250), None]
        );
        assert_eq!(of(None, 16, true), [Some(1), Some(4), Some(4), None, None, None]);
        assert_eq!(of(None, 62, true), [Some(1), Some(4), Some(4), Some(62), None, None]);
        let few: &[usize] = &[512, 4, 1, 64];
        assert_eq!(of(Some(few), 300, true), [Some(1), Some(4), Some(4), Some(64), None, None]);
        assert_eq!(of(Some(few), 300, false), [Some(1), None, Some(4), None, None, None]);
    }

    #[test]
    fn padding_has_few_sizes_and_adds_sequences_without_adapters() {
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
            sampled_from: Vec::new(),
        };
        assert!(is_decode(&rows.extents()));
        rows.widen_tables(4);
        rows.pad(4);
        assert_eq!(rows.extents(), Extents { rows: 4, logit_rows: 4, sequences: 4, max_blocks: 4 });
        assert_eq!(rows.block_tables, [1, 2, 3, 0, 4, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((rows.kv_slots[3], rows.lora_slots[3], rows.sequences[3]), (-1, -1, 3));
    }
}
