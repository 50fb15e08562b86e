//! Sequences that run, with the KV blocks that they hold.

use super::{Sequence, Work};
use crate::kv::KvBlocks;

/// Sequences that run, in the order of their admission.
#[derive(Debug)]
pub struct Running<T> {
    pub sequences: Vec<Sequence<T>>,
    /// Blocks that they may still take.
    pub reserved: usize,
}

impl<T> Default for Running<T> {
    fn default() -> Self {
        Self { sequences: Vec::new(), reserved: 0 }
    }
}

impl<T> Running<T> {
    /// Gives the sequence at `index` the blocks for `tokens` tokens. `false`: there are too few.
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

    /// Records that a share of a step was computed, and the token sampled after it.
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

    /// Removes the sequences that `ended` is true of, and their shares of the step `under_way`.
    pub fn remove(
        &mut self,
        under_way: &mut Vec<Work>,
        mut ended: impl FnMut(&mut Sequence<T>) -> bool,
    ) -> Vec<Sequence<T>> {
        let mut staying = 0;
        let mut places = Vec::with_capacity(self.sequences.len());
        let leaves = |sequence: &mut Sequence<T>| {
            let leaves = ended(sequence);
            places.push((!leaves).then_some(staying));
            staying += usize::from(!leaves);
            leaves
        };
        let gone = self.sequences.extract_if(.., leaves).collect();
        under_way.retain_mut(|work| {
            let place = places[work.sequence];
            work.sequence = place.unwrap_or_default();
            place.is_some()
        });
        gone
    }

    /// Frees the blocks of a sequence that was removed. With `keep_last`, its last block becomes known
    /// as a prefix though it is not full.
    pub fn release(&mut self, kv: &mut KvBlocks, sequence: &mut Sequence<T>, keep_last: bool) {
        if keep_last {
            insert_partial(kv, sequence);
        }
        kv.close(std::mem::take(&mut sequence.blocks));
        self.reserved -= std::mem::take(&mut sequence.reserved);
        (sequence.computed, sequence.published) = (0, 0);
    }
}

/// Makes a last block known that is not full.
fn insert_partial<T>(kv: &mut KvBlocks, sequence: &Sequence<T>) {
    let from = sequence.published * kv.plan().tokens_per_block;
    if from < sequence.computed {
        let tokens = &sequence.tokens[from..sequence.computed];
        kv.insert_partial(sequence.root, &sequence.blocks, sequence.published, tokens);
    }
}
