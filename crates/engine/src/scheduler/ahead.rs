//! The step after one that is still being computed.

use super::{Scheduler, Sequence, Work};

impl<T> Scheduler<T> {
    /// Shares the step after `before`, whose tokens are not known yet: a row for each sequence that
    /// goes on whatever it draws, at the place of the token that it draws. Those that have `ended`
    /// are left out, and so are those that reach their longest length. Takes the KV blocks for it.
    ///
    /// `None` where `before` has to be done first: a running sequence draws no token in it, one that
    /// waits may find a place, KV blocks are lacking, or nothing goes on.
    pub fn plan_after(
        &mut self,
        before: &[Work],
        ended: impl Fn(&Sequence<T>) -> bool,
    ) -> Option<Vec<Work>> {
        let mut drawn_from = vec![None; self.running.len()];
        for work in before.iter().filter(|work| work.samples) {
            drawn_from[work.sequence] = work.rows().last();
        }
        let mut works = Vec::with_capacity(before.len());
        for (i, sequence) in self.running.iter().enumerate().filter(|(_, s)| !ended(s)) {
            let (drawn_from, position) = (drawn_from[i]?, sequence.len());
            if position + 1 < sequence.max_len {
                works.push(decode(i, position, works.len(), drawn_from));
            }
        }
        // Who waits for blocks or for an adapter is not told from who can start: admission does that.
        let is_place_free = works.len() < self.limits.max_batch_size;
        if works.is_empty() || (is_place_free && !self.waiting.is_empty()) {
            return None;
        }
        let grown = works.iter().all(|work| self.grow(work.sequence, work.positions.end));
        grown.then_some(works)
    }
}

/// The share of a sequence whose token at `position` is being drawn.
fn decode(sequence: usize, position: usize, row: usize, drawn_from: usize) -> Work {
    Work {
        sequence,
        positions: position..position + 1,
        logits_from: position,
        samples: true,
        first_row: row,
        token_from: Some(drawn_from),
    }
}
