//! The queue of waiting sequences, and which of them is admitted next.

use std::collections::{HashSet, VecDeque};

use super::Sequence;
use crate::adapters::{AdapterId, AdapterTiers};

/// How far into the queue a step looks, so that its cost does not grow with the queue.
const MAX_SCANNED: usize = 256;

/// Waiting sequences in order of arrival. Preempted ones are put at the front.
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
    /// Adds a new sequence at the back.
    pub fn push(&mut self, sequence: Sequence<T>) {
        self.queue.push_back(sequence);
    }

    /// Adds a preempted sequence at the front.
    pub fn push_preempted(&mut self, sequence: Sequence<T>) {
        self.queue.push_front(sequence);
    }

    /// The sequences in queue order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Sequence<T>> {
        self.queue.iter()
    }

    /// Whether no sequence waits.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Most times that one sequence was overtaken.
    pub fn most_overtaken(&self) -> usize {
        self.most_overtaken
    }

    /// Index of the first sequence, from `from` on, whose adapter is on the device. `None` also if a
    /// sequence before it was overtaken `window` times already.
    pub fn next_ready(&self, tiers: &AdapterTiers, from: usize, window: usize) -> Option<usize> {
        let is_ready = |s: &Sequence<T>| s.adapter.is_none_or(|id| tiers.ready(id).is_some());
        let mut scanned = self.queue.iter().enumerate().take(MAX_SCANNED).skip(from);
        let index = scanned.find(|(_, sequence)| is_ready(sequence))?.0;
        let overtaken = self.queue.iter().take(index).map(|sequence| sequence.overtaken).max();
        overtaken.is_none_or(|times| times < window).then_some(index)
    }

    /// The sequence at `index`.
    pub fn get(&self, index: usize) -> Option<&Sequence<T>> {
        self.queue.get(index)
    }

    /// Removes the sequence at `index` for admission. It overtakes those before it.
    pub fn take(&mut self, index: usize) -> Option<Sequence<T>> {
        let taken = self.queue.remove(index)?;
        for sequence in self.queue.iter_mut().take(index) {
            sequence.overtaken += 1;
            self.most_overtaken = self.most_overtaken.max(sequence.overtaken);
        }
        Some(taken)
    }

    /// Removes the sequences for which `is_removed` is true.
    pub fn remove(&mut self, mut is_removed: impl FnMut(&Sequence<T>) -> bool) -> Vec<Sequence<T>> {
        let all = std::mem::take(&mut self.queue);
        let (removed, remaining): (Vec<_>, Vec<_>) = all.into_iter().partition(|s| is_removed(s));
        self.queue = remaining.into();
        removed
    }

    /// Adapters of the waiting sequences, each once, in queue order.
    pub fn wanted_adapters(&self) -> Vec<AdapterId> {
        let mut seen = HashSet::new();
        let of_queue = self.queue.iter().take(MAX_SCANNED).filter_map(|sequence| sequence.adapter);
        of_queue.filter(|id| seen.insert(*id)).collect()
    }
}
