//! What each running sequence gets of a step.

use std::ops::Range;

use super::{CapacityPolicy, Phase, Scheduler, Sequence};

/// A sequence's share of a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Work {
    /// Index of the sequence among those running.
    pub sequence: usize,
    /// Positions to compute.
    pub positions: Range<usize>,
    /// First position whose logits are wanted, up to the end of `positions`.
    pub logits_from: usize,
    /// Whether a token follows: the last position known is among those computed.
    pub samples: bool,
    /// First of its rows among the step's rows of logits.
    pub first_row: usize,
    /// Where the token to compute is still being drawn: the row of logits of the step before that it
    /// is drawn from.
    pub token_from: Option<usize>,
}

impl Work {
    /// Rows of logits that this share yields.
    pub fn logit_rows(&self) -> usize {
        self.positions.end - self.logits_from
    }

    /// Which of the step's rows of logits these are; a token that follows is drawn from the last.
    pub fn rows(&self) -> Range<usize> {
        self.first_row..self.first_row + self.logit_rows()
    }
}

impl<T> Scheduler<T> {
    /// Shares a step among the running sequences: one row for each that decodes, then prompts in
    /// the order of admission, cut into chunks where they do not fit. Takes the KV blocks for it,
    /// putting the sequences back that started last where there are too few.
    pub fn plan(&mut self) -> Vec<Work> {
        self.grow_all();
        let (mut rows, mut logits) = (self.limits.max_num_tokens, self.limits.max_logit_rows);
        let mut works = Vec::with_capacity(self.running.len());
        for phase in [Phase::Decode, Phase::Prefill] {
            for (i, sequence) in self.running.iter().enumerate() {
                if sequence.phase() != phase {
                    continue;
                }
                let Some(work) = share(i, sequence, rows, logits) else { continue };
                let first_row = self.limits.max_logit_rows - logits;
                rows -= work.positions.len();
                logits -= work.logit_rows();
                works.push(Work { first_row, ..work });
            }
        }
        works
    }

    /// Gives every running sequence the blocks for the tokens it has.
    fn grow_all(&mut self) {
        let mut i = 0;
        while i < self.running.len() {
            if self.grow(i, self.running[i].len()) {
                i += 1;
            } else {
                self.preempt_last();
            }
        }
    }

    /// Gives a running sequence the blocks for `tokens` tokens. `false`: there are too few.
    pub(super) fn grow(&mut self, index: usize, tokens: usize) -> bool {
        let needed = self.kv.blocks_for(tokens);
        let sequence = &mut self.running[index];
        while sequence.blocks.len() < needed {
            let Some(block) = self.kv.take() else { return false };
            sequence.blocks.push(block);
            if sequence.reserved > 0 {
                sequence.reserved -= 1;
                self.reserved -= 1;
            }
        }
        true
    }

    /// Puts the sequence back that started last; its tokens stay, and so do those of its blocks
    /// that are known as prefixes until somebody needs them.
    fn preempt_last(&mut self) {
        debug_assert_eq!(self.limits.policy, CapacityPolicy::MaxUtilization);
        if let Some(mut sequence) = self.running.pop() {
            self.let_go(&mut sequence);
            self.preemptions += 1;
            self.waiting.push_front(sequence);
        }
    }
}

/// As much of a sequence's uncomputed tokens as fit into `rows` rows, of which `logits` may yield
/// logits.
fn share<T>(index: usize, sequence: &Sequence<T>, rows: usize, logits: usize) -> Option<Work> {
    let work = |end: usize| Work {
        sequence: index,
        positions: sequence.computed..end,
        logits_from: sequence.logits_from(end),
        samples: end == sequence.len(),
        first_row: 0,
        token_from: None,
    };
    let full = work(sequence.len().min(sequence.computed + rows));
    let over = full.logit_rows().saturating_sub(logits);
    // Whether the last position's logits fit, too, is left to a step that has room for them.
    let cut = if over > 0 { work(full.positions.end - over) } else { full };
    (!cut.positions.is_empty() && cut.logit_rows() <= logits).then_some(cut)
}
