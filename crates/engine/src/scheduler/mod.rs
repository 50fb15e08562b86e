//! Which sequences run, and which of their tokens a step computes.
//!
//! Pure: no device types and no clocks, so it is tested as a state machine. Sequences are admitted in
//! the order of arrival once there are KV blocks for them and their adapter is on the device. One
//! whose adapter is not there yet lets later ones pass, but no more of them than the fairness window;
//! one that lacks KV blocks holds the queue.

mod admission;
mod ahead;
mod policy;
mod sequence;
mod share;

use std::collections::VecDeque;

pub use policy::{CapacityPolicy, Limits};
pub use sequence::{Phase, Sequence};
pub use share::Work;

use crate::adapters::AdapterTiers;
use crate::kv::KvBlocks;

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
    waiting: VecDeque<Sequence<T>>,
    running: Vec<Sequence<T>>,
    /// Blocks that running sequences may still take.
    reserved: usize,
    preemptions: u64,
    most_overtaken: usize,
    /// KV blocks.
    pub kv: KvBlocks,
    /// Adapters by where they are.
    pub tiers: AdapterTiers,
}

impl<T> Scheduler<T> {
    /// No sequences yet.
    pub fn new(limits: Limits, kv: KvBlocks, tiers: AdapterTiers) -> Self {
        Self {
            limits,
            waiting: VecDeque::new(),
            running: Vec::new(),
            reserved: 0,
            preemptions: 0,
            most_overtaken: 0,
            kv,
            tiers,
        }
    }

    /// Queues a sequence, whose `max_len` tokens must fit the KV cache.
    pub fn submit(&mut self, sequence: Sequence<T>) {
        if let Some(id) = sequence.adapter {
            self.tiers.lease(id);
        }
        self.waiting.push_back(sequence);
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Sequences that run, in the order of their admission.
    pub fn running(&self) -> &[Sequence<T>] {
        &self.running
    }

    /// Sequences that run, in the order of their admission.
    pub fn running_mut(&mut self) -> &mut [Sequence<T>] {
        &mut self.running
    }

    /// Sequences that wait, in their order.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = &Sequence<T>> {
        self.waiting.iter()
    }

    /// What it has done.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            waiting: self.waiting.len(),
            running: self.running.len(),
            preemptions: self.preemptions,
            most_overtaken: self.most_overtaken,
        }
    }

    /// Takes in that a share of a step was computed, and the token drawn after it.
    pub fn commit(&mut self, work: &Work, token: Option<u32>) {
        let size = self.kv.plan().tokens_per_block;
        let sequence = &mut self.running[work.sequence];
        sequence.computed = work.positions.end;
        sequence.reported = sequence.reported.max(work.positions.end);
        while (sequence.published + 1) * size <= sequence.computed {
            let index = sequence.published;
            let tokens = &sequence.tokens[index * size..(index + 1) * size];
            self.kv.publish(sequence.root, &mut sequence.blocks, index, tokens);
            sequence.published += 1;
        }
        sequence.tokens.extend(token);
    }

    /// Removes the running sequences that `ended` says have ended and frees what they held. Their
    /// shares of the step that is being computed, `under_way`, are dropped: what they write comes
    /// before whatever is done with their blocks from now on, and nobody reads it.
    pub fn retire(
        &mut self,
        under_way: &mut Vec<Work>,
        mut ended: impl FnMut(&mut Sequence<T>) -> bool,
    ) -> Vec<Sequence<T>> {
        let mut staying = 0;
        let mut places = Vec::with_capacity(self.running.len());
        let leaves = |sequence: &mut Sequence<T>| {
            let leaves = ended(sequence);
            places.push((!leaves).then_some(staying));
            staying += usize::from(!leaves);
            leaves
        };
        let mut done: Vec<_> = self.running.extract_if(.., leaves).collect();
        under_way.retain_mut(|work| match places[work.sequence] {
            Some(place) => {
                work.sequence = place;
                true
            }
            None => false,
        });
        for sequence in &mut done {
            self.insert_partial(sequence);
            self.let_go(sequence);
            self.end(sequence);
        }
        done
    }

    /// Removes waiting sequences.
    pub fn cancel_waiting(
        &mut self,
        mut cancelled: impl FnMut(&Sequence<T>) -> bool,
    ) -> Vec<Sequence<T>> {
        let all = std::mem::take(&mut self.waiting);
        let (gone, waiting): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|sequence| cancelled(sequence));
        self.waiting = waiting.into();
        gone.iter().for_each(|sequence| self.end(sequence));
        gone
    }

    /// Frees what a sequence that ran holds.
    fn let_go(&mut self, sequence: &mut Sequence<T>) {
        self.kv.close(std::mem::take(&mut sequence.blocks));
        self.reserved -= std::mem::take(&mut sequence.reserved);
        (sequence.computed, sequence.published) = (0, 0);
        if let (Some(id), Some(_)) = (sequence.adapter, sequence.slot.take()) {
            self.tiers.unpin(id);
        }
    }

    /// Makes a last block known that is not full.
    fn insert_partial(&mut self, sequence: &mut Sequence<T>) {
        let from = sequence.published * self.kv.plan().tokens_per_block;
        if from < sequence.computed {
            let tail = &sequence.tokens[from..sequence.computed];
            let index = sequence.published;
            self.kv.insert_partial(sequence.root, &sequence.blocks, index, tail);
        }
    }

    fn end(&mut self, sequence: &Sequence<T>) {
        if let Some(id) = sequence.adapter {
            self.tiers.unlease(id);
        }
    }
}

#[cfg(test)]
mod tests;
