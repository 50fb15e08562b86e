//! Sequences that wait, and which of them may start next.

use std::collections::{HashSet, VecDeque};

use super::Sequence;
use crate::adapters::{AdapterId, AdapterTiers};

/// Waiting sequences that are looked at in a step, so that a long queue costs no more than a short
/// one.
const SCANNED: usize = 256;

/// Sequences that wait, in the order of arrival; preempted ones come first.
#[derive(Debug)]
pub struct Waiting<T> {
    queue: VecDeque<Sequence<T>>,
    most_overtaken: usize,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self { queue: VecDeque::new(), most_overtaken: 0 }
    }
}

impl<T> Waiting<T> {
    /// Adds a sequence that has arrived.
    pub fn push(&mut self, sequence: Sequence<T>) {
        self.queue.push_back(sequence);
    }

    /// Adds a sequence that was preempted.
    pub fn push_preempted(&mut self, sequence: Sequence<T>) {
        self.queue.push_front(sequence);
    }

    /// In their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Sequence<T>> {
        self.queue.iter()
    }

    /// Whether no sequence waits.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The most later sequences that were started before one that waited for its adapter.
    pub fn most_overtaken(&self) -> usize {
        self.most_overtaken
    }

    /// The first sequence from `from` on whose adapter is on the device, and that may overtake those
    /// before it.
    pub fn next_ready(&self, tiers: &AdapterTiers, from: usize, window: usize) -> Option<usize> {
        let is_ready = |s: &Sequence<T>| s.adapter.is_none_or(|id| tiers.ready(id).is_some());
        let mut scanned = self.queue.iter().enumerate().take(SCANNED).skip(from);
        let index = scanned.find(|(_, sequence)| is_ready(sequence))?.0;
        let overtaken = self.queue.iter().take(index).map(|sequence| sequence.overtaken).max();
        overtaken.is_none_or(|times| times < window).then_some(index)
    }

    /// The sequence at `index`.
    pub fn get(&self, index: usize) -> Option<&Sequence<T>> {
        self.queue.get(index)
    }

    /// Removes the sequence at `index`, which starts and so overtakes those before it.
    pub fn take(&mut self, index: usize) -> Option<Sequence<T>> {
        let taken = self.queue.remove(index)?;
        for sequence in self.queue.iter_mut().take(index) {
            sequence.overtaken += 1;
            self.most_overtaken = self.most_overtaken.max(sequence.overtaken);
        }
        Some(taken)
    }

    /// Removes the sequences that `leaves` is true of.
    pub fn remove(&mut self, mut leaves: impl FnMut(&Sequence<T>) -> bool) -> Vec<Sequence<T>> {
        let all = std::mem::take(&mut self.queue);
        let (gone, staying): (Vec<_>, Vec<_>) = all.into_iter().partition(|s| leaves(s));
        self.queue = staying.into();
        gone
    }

    /// Adapters that are wanted, each once, in the order of the queue.
    pub fn wanted_adapters(&self) -> Vec<AdapterId> {
        let mut seen = HashSet::new();
        let of_queue = self.queue.iter().take(SCANNED).filter_map(|sequence| sequence.adapter);
        of_queue.filter(|id| seen.insert(*id)).collect()
    }
}
