//! Which sequences run, and which of their tokens a step computes.
//!
//! Pure: no device types and no clocks, so it is tested as a state machine. Sequences are admitted in
//! the order of arrival once there are KV blocks for them and their adapter is on the device. One
//! whose adapter is not there yet lets later ones pass, but no more of them than the fairness window;
//! one that lacks KV blocks holds the queue.

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
use self::work::{share_next, share_step};
use crate::adapters::AdapterTiers;
use crate::kv::{BlockCopy, KvBlocks};

/// What the scheduler has done, since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SchedulerStats {
    /// Sequences that wait.
    pub waiting: usize,
    /// Sequences that run.
    pub running: usize,
    /// Sequences that were put back to make room, each time.
    pub preemptions: u64,
    /// The most later sequences that were admitted before one that waited for its adapter.
    pub most_overtaken: usize,
}

/// Sequences waiting and running, and the memory they hold.
#[derive(Debug)]
pub struct Scheduler<T> {
    limits: Limits,
    waiting: Waiting<T>,
    running: Running<T>,
    preemptions: u64,
    /// KV blocks.
    pub kv: KvBlocks,
    /// Adapters by where they are.
    pub tiers: AdapterTiers,
}

impl<T> Scheduler<T> {
    /// No sequences yet.
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

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.sequences.is_empty()
    }

    /// Sequences that run, in the order of their admission.
    pub fn running(&self) -> &[Sequence<T>] {
        &self.running.sequences
    }

    /// Sequences that run, in the order of their admission.
    pub fn running_mut(&mut self) -> &mut [Sequence<T>] {
        &mut self.running.sequences
    }

    /// Sequences that wait, in their order.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = &Sequence<T>> {
        self.waiting.iter()
    }

    /// What it has done.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            waiting: self.waiting.iter().len(),
            running: self.running.sequences.len(),
            preemptions: self.preemptions,
            most_overtaken: self.waiting.most_overtaken(),
        }
    }

    /// Starts waiting sequences while they fit, and asks for the adapters of the others. Returns
    /// what has to be copied in the KV cache before the next step, in this order.
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

    /// Starts the waiting sequence at `index`, whose adapter is on the device. `false`: there are
    /// too few KV blocks.
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

    /// Shares a step among the running sequences: one row for each that decodes, then prompts in
    /// the order of admission, cut into chunks where they do not fit. Takes the KV blocks for it,
    /// preempting the sequences that started last where there are too few.
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
        share_step(&self.running.sequences, &self.limits)
    }

    /// Shares the step after `before`, whose tokens are not known yet: a row for each sequence that
    /// goes on whatever token is sampled, at the place of that token. Those that have `ended` are left
    /// out, and so are those that reach their longest length. Takes the KV blocks for it.
    ///
    /// `None` where `before` has to be done first: a running sequence samples no token in it, one that
    /// waits may find a place, KV blocks are lacking, or no sequence goes on.
    pub fn plan_after(
        &mut self,
        before: &[Work],
        ended: impl Fn(&Sequence<T>) -> bool,
    ) -> Option<Vec<Work>> {
        let works = share_next(&self.running.sequences, before, ended)?;
        // Whether a waiting sequence can start, for its blocks and its adapter, is for admission to say.
        let is_place_free = works.len() < self.limits.max_batch_size;
        if works.is_empty() || (is_place_free && !self.waiting.is_empty()) {
            return None;
        }
        let mut grown = works
            .iter()
            .map(|work| self.running.grow(&mut self.kv, work.sequence, work.positions.end));
        grown.all(|grown| grown).then_some(works)
    }

    /// Records that a share of a step was computed, and the token sampled after it.
    pub fn commit(&mut self, work: &Work, token: Option<u32>) {
        self.running.commit(&mut self.kv, work, token);
    }

    /// Removes the running sequences that `ended` is true of and frees what they held. Their
    /// shares of the step `under_way` are dropped: it writes to their blocks before any later step
    /// does, and its results for them are not read.
    pub fn retire(
        &mut self,
        under_way: &mut Vec<Work>,
        ended: impl FnMut(&mut Sequence<T>) -> bool,
    ) -> Vec<Sequence<T>> {
        let mut done = self.running.remove(under_way, ended);
        for sequence in &mut done {
            self.running.release(&mut self.kv, sequence, true);
            self.release_slot(sequence);
            self.end_lease(sequence);
        }
        done
    }

    /// Removes waiting sequences.
    pub fn cancel_waiting(
        &mut self,
        cancelled: impl FnMut(&Sequence<T>) -> bool,
    ) -> Vec<Sequence<T>> {
        let gone = self.waiting.remove(cancelled);
        gone.iter().for_each(|sequence| self.end_lease(sequence));
        gone
    }

    /// Puts the sequence that started last back in the queue. Its tokens stay, and its full blocks
    /// stay known as prefixes until their memory is needed.
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
