//! What each running sequence gets of a step.

use std::ops::Range;

use super::{Limits, Phase, Sequence};

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
    /// Overlap scheduling: the row of the previous step's logits that the token to compute is sampled
    /// from, as the host does not know that token yet. `None` where it does.
    pub sampled_from: Option<usize>,
}

impl Work {
    /// Rows of logits that this share yields.
    pub fn logit_rows(&self) -> usize {
        self.positions.end - self.logits_from
    }

    /// Which of the step's rows of logits these are; a token that follows is sampled from the last.
    pub fn rows(&self) -> Range<usize> {
        self.first_row..self.first_row + self.logit_rows()
    }
}

/// Shares a step among sequences: one row for each that decodes, then prompts in their order, cut into
/// chunks where they do not fit.
pub(super) fn share_step<T>(running: &[Sequence<T>], limits: &Limits) -> Vec<Work> {
    let (mut rows, mut logits) = (limits.max_num_tokens, limits.max_logit_rows);
    let mut works = Vec::with_capacity(running.len());
    for phase in [Phase::Decode, Phase::Prefill] {
        for (i, sequence) in running.iter().enumerate().filter(|(_, s)| s.phase() == phase) {
            let Some(work) = share(i, sequence, rows, logits) else { continue };
            let first_row = limits.max_logit_rows - logits;
            rows -= work.positions.len();
            logits -= work.logit_rows();
            works.push(Work { first_row, ..work });
        }
    }
    works
}

/// Shares the step after `before`, whose tokens are not known yet: a row for each sequence that goes on
/// whatever token is sampled, at the place of that token. Those that have `ended` are left out, and
/// so are those that reach their longest length. `None`: a sequence samples no token in `before`.
pub(super) fn share_next<T>(
    running: &[Sequence<T>],
    before: &[Work],
    ended: impl Fn(&Sequence<T>) -> bool,
) -> Option<Vec<Work>> {
    let mut sampled_from = vec![None; running.len()];
    for work in before.iter().filter(|work| work.samples) {
        sampled_from[work.sequence] = work.rows().last();
    }
    let mut works = Vec::with_capacity(before.len());
    for (i, sequence) in running.iter().enumerate().filter(|(_, s)| !ended(s)) {
        let (row, position) = (sampled_from[i]?, sequence.len());
        if position + 1 < sequence.max_len {
            works.push(Work {
                sequence: i,
                positions: position..position + 1,
                logits_from: position,
                samples: true,
                first_row: works.len(),
                sampled_from: Some(row),
            });
        }
    }
    Some(works)
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
        sampled_from: None,
    };
    let full = work(sequence.len().min(sequence.computed + rows));
    let over = full.logit_rows().saturating_sub(logits);
    // Whether the last position's logits fit, too, is left to a step that has room for them.
    let cut = if over > 0 { work(full.positions.end - over) } else { full };
    (!cut.positions.is_empty() && cut.logit_rows() <= logits).then_some(cut)
}
