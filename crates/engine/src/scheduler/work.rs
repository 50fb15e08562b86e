//! Plans of steps: which positions of which sequences a step computes.

use std::ops::Range;

use super::{Limits, Phase, Sequence};

/// The work of one sequence in a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Work {
    /// Index of the sequence in [`Scheduler::running`](super::Scheduler::running).
    pub sequence: usize,
    /// Positions to compute.
    pub positions: Range<usize>,
    /// First position whose logits are computed; they are computed up to the end of `positions`.
    pub logits_from: usize,
    /// Whether a token is sampled: the sequence's last known position is computed.
    pub samples: bool,
    /// Index of its first row among the step's rows of logits.
    pub first_row: usize,
    /// Overlap scheduling: the row of the previous step's logits that the token to compute is sampled
    /// from, as the host does not know that token yet. `None` where it does.
    pub sampled_from: Option<usize>,
}

impl Work {
    /// Number of its rows of logits.
    pub fn logit_rows(&self) -> usize {
        self.positions.end - self.logits_from
    }

    /// Its rows among the step's rows of logits. A token is sampled from the last one.
    pub fn rows(&self) -> Range<usize> {
        self.first_row..self.first_row + self.logit_rows()
    }
}

/// Plans a step within the limits: one row for each sequence in decode, then prefill in order, in chunks
/// where a prompt does not fit.
pub(super) fn plan_step<T>(running: &[Sequence<T>], limits: &Limits) -> Vec<Work> {
    let (mut rows, mut logits) = (limits.max_num_tokens, limits.max_logit_rows);
    let mut works = Vec::with_capacity(running.len());
    for phase in [Phase::Decode, Phase::Prefill] {
        for (i, sequence) in running.iter().enumerate().filter(|(_, s)| s.phase() == phase) {
            let Some(work) = plan_sequence(i, sequence, rows, logits) else { continue };
            let first_row = limits.max_logit_rows - logits;
            rows -= work.positions.len();
            logits -= work.logit_rows();
            works.push(Work { first_row, ..work });
        }
    }
    works
}

/// Plans the decode step after `before`, whose sampled tokens are not known yet: see
/// [`Scheduler::plan_after`](super::Scheduler::plan_after). `None` if a sequence samples no token in
/// `before`.
pub(super) fn plan_next_decode<T>(
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

/// The work for as many of a sequence's uncomputed tokens as fit `rows` rows and `logits` rows of
/// logits; `None` if none do.
fn plan_sequence<T>(
    index: usize,
    sequence: &Sequence<T>,
    rows: usize,
    logits: usize,
) -> Option<Work> {
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
    // Cut positions are left to a later step that has room for their logits.
    let cut = if over > 0 { work(full.positions.end - over) } else { full };
    (!cut.positions.is_empty() && cut.logit_rows() <= logits).then_some(cut)
}
