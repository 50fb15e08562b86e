//! Running sequences and their KV blocks.

use super::{Sequence, Work};
use crate::kv::KvBlocks;

/// Running sequences in order of admission.
#[derive(Debug)]
pub struct Running<T> {
    pub sequences: Vec<Sequence<T>>,
    /// Sum of [`Sequence::reserved`]: blocks that they are guaranteed but have not taken yet.
    pub reserved: usize,
}

impl<T> Default for Running<T> {
    fn default() -> Self {
        Self { sequences: Vec::new(), reserved: 0 }
    }
}

impl<T> Running<T> {
    /// Allocates blocks to the sequence at `index` until it has room for `tokens` tokens. Returns `false`
    /// if there are too few.
    pub fn grow(&mut self, kv: &mut KvBlocks, index: usize, tokens: usize) -> bool {
        let needed = kv.blocks_for(tokens);
        let sequence = &mut self.sequences[index];
        while sequence.blocks.len() < needed {
            let Some(block) = kv.take() else { return false };
            sequence.blocks.push(block);
            if sequence.reserved > 0 {
                sequence.reserved -= 1;
                self.reserved -= 1;
            }
        }
        true
    }

    /// Records that a sequence's work of a step was computed, and the token that was sampled. Adds the
    /// blocks that became full to the prefix tree.
    pub fn commit(&mut self, kv: &mut KvBlocks, work: &Work, token: Option<u32>) {
        let size = kv.plan().tokens_per_block;
        let sequence = &mut self.sequences[work.sequence];
        sequence.computed = work.positions.end;
        sequence.reported = sequence.reported.max(work.positions.end);
        while (sequence.published + 1) * size <= sequence.computed {
            let index = sequence.published;
            let tokens = &sequence.tokens[index * size..(index + 1) * size];
            kv.publish(sequence.root, &mut sequence.blocks, index, tokens);
            sequence.published += 1;
        }
        sequence.tokens.extend(token);
    }

    /// Removes the sequences for which `ended` is true, and their work from the step `in_progress`. The
    /// indices of the remaining work are adjusted.
    pub fn remove(
        &mut self,
        in_progress: &mut Vec<Work>,
        mut ended: impl FnMut(&mut Sequence<T>) -> bool,
    ) -> Vec<Sequence<T>> {
        let mut remaining = 0;
        let mut new_indices = Vec::with_capacity(self.sequences.len());
        let is_removed = |sequence: &mut Sequence<T>| {
            let removed = ended(sequence);
            new_indices.push((!removed).then_some(remaining));
            remaining += usize::from(!removed);
            removed
        };
        let removed = self.sequences.extract_if(.., is_removed).collect();
        in_progress.retain_mut(|work| {
            let index = new_indices[work.sequence];
            work.sequence = index.unwrap_or_default();
            index.is_some()
        });
        removed
    }

    /// Frees the blocks of a sequence that was removed. With `keep_last`, its last block enters the prefix
    /// tree even if it is not full.
    pub fn release(&mut self, kv: &mut KvBlocks, sequence: &mut Sequence<T>, keep_last: bool) {
        if keep_last {
            insert_partial(kv, sequence);
        }
        kv.close(std::mem::take(&mut sequence.blocks));
        self.reserved -= std::mem::take(&mut sequence.reserved);
        (sequence.computed, sequence.published) = (0, 0);
    }
}

/// Adds a sequence's last, partly filled block to the prefix tree.
fn insert_partial<T>(kv: &mut KvBlocks, sequence: &Sequence<T>) {
    let from = sequence.published * kv.plan().tokens_per_block;
    if from < sequence.computed {
        let tokens = &sequence.tokens[from..sequence.computed];
        kv.insert_partial(sequence.root, &sequence.blocks, sequence.published, tokens);
    }
}
