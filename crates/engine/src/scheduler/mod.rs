//! Which sequences run, and which of their tokens a step computes.
//!
//! Pure: no device types and no clocks, so it can be tested as a state machine. Sequences are
//! admitted in the order of arrival once KV blocks for their longest possible length and a slot
//! for their adapter are free; they keep both until they end. The first one that does not fit
//! holds the queue, so nobody is overtaken.

mod sequence;

use std::collections::VecDeque;
use std::ops::Range;

pub use sequence::{Phase, Sequence};

use crate::adapters::SlotTable;
use crate::kv::BlockPool;

/// Bounds of a step.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences that run at a time.
    pub max_batch_size: usize,
    /// Rows of one step.
    pub max_num_tokens: usize,
    /// Rows of one step that yield logits.
    pub max_logit_rows: usize,
}

/// A sequence's share of a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Work {
    /// Index of the sequence among those running.
    pub sequence: usize,
    /// Positions to compute.
    pub positions: Range<usize>,
    /// Whether logits of every position are wanted, or only of the last one of a complete prompt.
    pub all_logits: bool,
    /// Whether a token follows: the last position known is among those computed.
    pub samples: bool,
}

impl Work {
    /// Rows of logits that this share yields.
    pub fn logit_rows(&self) -> usize {
        if self.all_logits { self.positions.len() } else { usize::from(self.samples) }
    }
}

/// Sequences waiting and running, and the memory they hold.
#[derive(Debug)]
pub struct Scheduler<T> {
    limits: Limits,
    waiting: VecDeque<Sequence<T>>,
    running: Vec<Sequence<T>>,
    /// KV blocks.
    pub blocks: BlockPool,
    /// Adapter slots.
    pub slots: SlotTable,
}

impl<T> Scheduler<T> {
    /// No sequences yet.
    pub fn new(limits: Limits, blocks: BlockPool, slots: SlotTable) -> Self {
        Self { limits, waiting: VecDeque::new(), running: Vec::new(), blocks, slots }
    }

    /// Queues a sequence.
    pub fn submit(&mut self, sequence: Sequence<T>) {
        self.waiting.push_back(sequence);
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Sequences that run, in the order of their admission.
    pub fn running(&mut self) -> &mut [Sequence<T>] {
        &mut self.running
    }

    /// Admits waiting sequences while they fit. Returns the indices of admitted sequences whose
    /// adapter has to be written into its slot before the next step.
    pub fn admit(&mut self) -> Vec<usize> {
        let mut fresh = Vec::new();
        while self.running.len() < self.limits.max_batch_size {
            let Some(next) = self.waiting.front() else { break };
            if self.blocks.blocks_for(next.max_len) > self.blocks.available() {
                break;
            }
            let slotted = match next.adapter {
                None => None,
                Some(adapter) => match self.slots.acquire(adapter) {
                    None => break,
                    some => some,
                },
            };
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            sequence.slot = slotted.map(|s| s.slot);
            let count = self.blocks.blocks_for(sequence.max_len);
            sequence.blocks = self.blocks.take(count).unwrap_or_default();
            if slotted.is_some_and(|s| s.fresh) {
                fresh.push(self.running.len());
            }
            self.running.push(sequence);
        }
        fresh
    }

    /// Shares a step among the running sequences: one row for each that decodes, then prompts in
    /// the order of admission, cut into chunks where they do not fit.
    pub fn plan(&self) -> Vec<Work> {
        let (mut rows, mut logits) = (self.limits.max_num_tokens, self.limits.max_logit_rows);
        let mut works = Vec::new();
        for phase in [Phase::Decode, Phase::Prefill] {
            for (i, sequence) in self.running.iter().enumerate() {
                if sequence.phase() != phase {
                    continue;
                }
                let room = if sequence.all_logits { rows.min(logits) } else { rows };
                let Some(work) = share(i, sequence, room).filter(|w| w.logit_rows() <= logits)
                else {
                    continue;
                };
                rows -= work.positions.len();
                logits -= work.logit_rows();
                works.push(work);
            }
        }
        works
    }

    /// Removes the sequences that `ended` says have ended and frees what they held.
    pub fn retire(&mut self, ended: impl Fn(&Sequence<T>) -> bool) -> Vec<Sequence<T>> {
        let (done, running) = std::mem::take(&mut self.running).into_iter().partition(&ended);
        self.running = running;
        let mut done: Vec<Sequence<T>> = done;
        for sequence in &mut done {
            self.blocks.give(std::mem::take(&mut sequence.blocks));
            if let Some(slot) = sequence.slot.take() {
                self.slots.release(slot);
            }
        }
        done
    }

    /// Removes waiting sequences.
    pub fn cancel_waiting(&mut self, cancelled: impl Fn(&Sequence<T>) -> bool) -> Vec<Sequence<T>> {
        let (gone, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(&cancelled);
        self.waiting = waiting.into();
        gone
    }
}

/// As much of a sequence's uncomputed tokens as `room` rows hold.
fn share<T>(index: usize, sequence: &Sequence<T>, room: usize) -> Option<Work> {
    let end = sequence.len().min(sequence.computed + room);
    (end > sequence.computed).then(|| Work {
        sequence: index,
        positions: sequence.computed..end,
        all_logits: sequence.all_logits && sequence.phase() == Phase::Prefill,
        samples: end == sequence.len(),
    })
}

#[cfg(test)]
mod tests;
