//! From waiting to running.

use std::collections::HashSet;

use super::{CapacityPolicy, Scheduler};
use crate::adapters::AdapterId;
use crate::kv::BlockCopy;

/// Waiting sequences that are looked at in a step, so that a long queue costs no more than a short
/// one.
const SCANNED: usize = 256;

impl<T> Scheduler<T> {
    /// Admits waiting sequences while they fit, and asks for the adapters of the others. Returns
    /// what has to be copied in the KV cache before the next step, in this order.
    pub fn admit(&mut self) -> Vec<BlockCopy> {
        let copies = self.start_ready();
        self.ask_for_adapters();
        copies
    }

    fn start_ready(&mut self) -> Vec<BlockCopy> {
        let mut copies = Vec::new();
        // Sequences passed over, and how often the one was that was so most often.
        let (mut passed, mut overtaken) = (0, 0);
        while self.running.len() < self.limits.max_batch_size && passed < SCANNED {
            let Some(next) = self.waiting.get(passed) else { break };
            if next.adapter.is_some_and(|id| self.tiers.ready(id).is_none()) {
                overtaken = overtaken.max(next.overtaken);
                passed += 1;
                continue;
            }
            if passed > 0 && overtaken >= self.limits.fairness_window {
                break;
            }
            if !self.start(passed, &mut copies) {
                break;
            }
            for sequence in self.waiting.iter_mut().take(passed) {
                sequence.overtaken += 1;
                overtaken = overtaken.max(sequence.overtaken);
            }
            self.most_overtaken = self.most_overtaken.max(overtaken);
        }
        copies
    }

    /// Starts the waiting sequence at `index`, whose adapter is on the device. `false`: there are
    /// too few KV blocks.
    fn start(&mut self, index: usize, copies: &mut Vec<BlockCopy>) -> bool {
        let next = &self.waiting[index];
        let root = next.adapter.and_then(|id| self.tiers.ready(id));
        let later = match self.limits.policy {
            CapacityPolicy::GuaranteedNoEvict => {
                self.kv.blocks_for(next.max_len) - self.kv.blocks_for(next.len())
            }
            CapacityPolicy::MaxUtilization => 0,
        };
        let spare = self.reserved + later;
        let Some(opening) = self.kv.open(root, &next.tokens, next.reusable(), spare) else {
            return false;
        };
        let Some(mut sequence) = self.waiting.remove(index) else { return false };
        sequence.slot = sequence.adapter.and_then(|id| self.tiers.pin(id));
        sequence.root = root;
        sequence.blocks = opening.blocks;
        (sequence.computed, sequence.published) = (opening.cached, opening.shared);
        sequence.reserved = later;
        self.reserved += later;
        copies.extend(opening.copy);
        self.running.push(sequence);
        true
    }

    fn ask_for_adapters(&mut self) {
        let mut seen = HashSet::new();
        let of_queue = self.waiting.iter().take(SCANNED).filter_map(|sequence| sequence.adapter);
        let wanted: Vec<AdapterId> = of_queue.filter(|id| seen.insert(*id)).collect();
        self.tiers.fetch(&wanted);
    }
}
