//! Continuous batching: which sequences run, and which of their tokens each step computes.
//!
//! The scheduler has no device types and no clocks, so it is tested as a state machine. Sequences are
//! admitted in order of arrival, once enough KV blocks are free and their adapter is on the device. A
//! sequence whose adapter is still loading may be overtaken, by at most `fairness_window` later ones, so
//! that a slow adapter does not stall the batch. A sequence that lacks KV blocks is not overtaken, so that
//! short sequences cannot starve a long one.

mod policy;
mod running;
mod sequence;
mod waiting;
mod work;

pub use policy::{CapacityPolicy, Limits};
pub use sequence::{Phase, Sequence};
pub use work::Work;

use self::running::Running;
use self::waiting::Waiting;
use self::work::{plan_next_decode, plan_step};
use crate::adapters::AdapterTiers;
use crate::kv::{BlockCopy, KvBlocks};

/// Queue lengths, and counts since the engine's start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SchedulerStats {
    /// Waiting sequences.
    pub waiting: usize,
    /// Running sequences.
    pub running: usize,
    /// Preemptions.
    pub preemptions: u64,
    /// Most times that a sequence waiting for its adapter was overtaken.
    pub most_overtaken: usize,
}

/// Waiting and running sequences, with the KV blocks and adapter slots that they hold.
#[derive(Debug)]
pub struct Scheduler<T> {
    limits: Limits,
    waiting: Waiting<T>,
    running: Running<T>,
    preemptions: u64,
    /// KV blocks.
    pub kv: KvBlocks,
    /// Adapters in host memory and on the device.
    pub tiers: AdapterTiers,
}

impl<T> Scheduler<T> {
    /// A scheduler without sequences.
    pub fn new(limits: Limits, kv: KvBlocks, tiers: AdapterTiers) -> Self {
        let (waiting, running) = (Waiting::default(), Running::default());
        Self { limits, waiting, running, preemptions: 0, kv, tiers }
    }

    /// Queues a sequence, whose `max_len` tokens must fit the KV cache.
    pub fn submit(&mut self, sequence: Sequence<T>) {
        if let Some(id) = sequence.adapter {
            self.tiers.lease(id);
        }
        self.waiting.push(sequence);
    }

    /// Whether no sequence waits or runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.sequences.is_empty()
    }

    /// Running sequences in order of admission.
    pub fn running(&self) -> &[Sequence<T>] {
        &self.running.sequences
    }

    /// Running sequences in order of admission.
    pub fn running_mut(&mut self) -> &mut [Sequence<T>] {
        &mut self.running.sequences
    }

    /// Waiting sequences in queue order.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = &Sequence<T>> {
        self.waiting.iter()
    }

    /// Queue lengths and counts.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            waiting: self.waiting.iter().len(),
            running: self.running.sequences.len(),
            preemptions: self.preemptions,
            most_overtaken: self.waiting.most_overtaken(),
        }
    }

    /// Admits waiting sequences while they fit, and requests the adapters of the others. Returns the KV
    /// block copies to carry out before the next step, in this order.
    pub fn admit(&mut self) -> Vec<BlockCopy> {
        let (mut copies, mut from) = (Vec::new(), 0);
        while self.running.sequences.len() < self.limits.max_batch_size {
            let window = self.limits.fairness_window;
            let Some(next) = self.waiting.next_ready(&self.tiers, from, window) else { break };
            if !self.start(next, &mut copies) {
                break;
            }
            from = next;
        }
        self.tiers.fetch(&self.waiting.wanted_adapters());
        copies
    }

    /// Admits the waiting sequence at `index`, whose adapter is on the device. Returns `false` if too few
    /// KV blocks are available.
    fn start(&mut self, index: usize, copies: &mut Vec<BlockCopy>) -> bool {
        let Some(next) = self.waiting.get(index) else { return false };
        let root = next.adapter.and_then(|id| self.tiers.ready(id));
        let later = match self.limits.policy {
            CapacityPolicy::GuaranteedNoEvict => {
                self.kv.blocks_for(next.max_len) - self.kv.blocks_for(next.len())
            }
            CapacityPolicy::MaxUtilization => 0,
        };
        let spare = self.running.reserved + later;
        let Some(opening) = self.kv.open(root, &next.tokens, next.reusable(), spare) else {
            return false;
        };
        let Some(mut sequence) = self.waiting.take(index) else { return false };
        sequence.slot = sequence.adapter.and_then(|id| self.tiers.acquire(id));
        sequence.root = root;
        sequence.blocks = opening.blocks;
        (sequence.computed, sequence.published) = (opening.cached, opening.shared);
        sequence.reserved = later;
        self.running.reserved += later;
        copies.extend(opening.copy);
        self.running.sequences.push(sequence);
        true
    }

    /// Plans a step: one row for each sequence in decode, then prefill in order of admission, in chunks
    /// where a prompt does not fit. Allocates the KV blocks, and preempts the most recently admitted
    /// sequences if there are too few.
    pub fn plan(&mut self) -> Vec<Work> {
        let mut i = 0;
        while i < self.running.sequences.len() {
            let tokens = self.running.sequences[i].len();
            if self.running.grow(&mut self.kv, i, tokens) {
                i += 1;
            } else {
                self.preempt_last();
            }
        }
        plan_step(&self.running.sequences, &self.limits)
    }

    /// Overlap scheduling: plans the decode step after `before`, whose sampled tokens are not known yet.
    /// Each sequence gets the row of the token being sampled, except those that have `ended` or reach their
    /// maximum length with that token. Allocates the KV blocks.
    ///
    /// `None` if `before` has to finish first: a running sequence samples no token in it (it is in
    /// prefill), a waiting sequence could be admitted, too few KV blocks are free, or no sequence
    /// continues.
    pub fn plan_after(
        &mut self,
        before: &[Work],
        ended: impl Fn(&Sequence<T>) -> bool,
    ) -> Option<Vec<Work>> {
        let works = plan_next_decode(&self.running.sequences, before, ended)?;
        // `admit` decides whether the waiting sequence can start; here it is enough that it might.
        let has_free_place = works.len() < self.limits.max_batch_size;
        if works.is_empty() || (has_free_place && !self.waiting.is_empty()) {
            return None;
        }
        let mut grown = works
            .iter()
            .map(|work| self.running.grow(&mut self.kv, work.sequence, work.positions.end));
        grown.all(|grown| grown).then_some(works)
    }

    /// Records that a sequence's work of a step was computed, and the token that was sampled.
    pub fn commit(&mut self, work: &Work, token: Option<u32>) {
        self.running.commit(&mut self.kv, work, token);
    }

    /// Removes the running sequences for which `ended` is true, and frees their blocks and slots. Their work
    /// is dropped from the step `in_progress`, if there is one. That step still writes to their blocks, but
    /// before any later step does, as the device works in order; its results for them are not read.
    pub fn retire(
        &mut self,
        in_progress: &mut Vec<Work>,
        ended: impl FnMut(&mut Sequence<T>) -> bool,
    ) -> Vec<Sequence<T>> {
        let mut done = self.running.remove(in_progress, ended);
        for sequence in &mut done {
            self.running.release(&mut self.kv, sequence, true);
            self.release_slot(sequence);
            self.end_lease(sequence);
        }
        done
    }

    /// Removes the waiting sequences for which `cancelled` is true.
    pub fn cancel_waiting(
        &mut self,
        cancelled: impl FnMut(&Sequence<T>) -> bool,
    ) -> Vec<Sequence<T>> {
        let gone = self.waiting.remove(cancelled);
        gone.iter().for_each(|sequence| self.end_lease(sequence));
        gone
    }

    /// Preempts the most recently admitted sequence: frees its blocks and puts it back in the queue, to be
    /// recomputed. Its tokens are kept, and its full blocks stay in the prefix tree until they are evicted.
    fn preempt_last(&mut self) {
        debug_assert_eq!(self.limits.policy, CapacityPolicy::MaxUtilization);
        if let Some(mut sequence) = self.running.sequences.pop() {
            self.running.release(&mut self.kv, &mut sequence, false);
            self.release_slot(&mut sequence);
            self.preemptions += 1;
            self.waiting.push_preempted(sequence);
        }
    }

    fn release_slot(&mut self, sequence: &mut Sequence<T>) {
        if let (Some(id), Some(_)) = (sequence.adapter, sequence.slot.take()) {
            self.tiers.release(id);
        }
    }

    fn end_lease(&mut self, sequence: &Sequence<T>) {
        if let Some(id) = sequence.adapter {
            self.tiers.unlease(id);
        }
    }
}

#[cfg(test)]
mod tests;
