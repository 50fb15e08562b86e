//! What a step may hold, and when a sequence may start.

use serde::{Deserialize, Serialize};

/// When a waiting sequence may start, under TensorRT-LLM's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum CapacityPolicy {
    /// Once there are KV blocks for its longest possible length: it then runs to its end.
    #[default]
    GuaranteedNoEvict,
    /// Once there are blocks for the tokens it has. If the running ones need more than there are,
    /// the one that started last is put back, to be computed again later.
    MaxUtilization,
}

/// Bounds of a step and of the queue.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences that run at a time.
    pub max_batch_size: usize,
    /// Rows of one step; at least `max_batch_size`.
    pub max_num_tokens: usize,
    /// Rows of one step that yield logits; at least `max_batch_size`.
    pub max_logit_rows: usize,
    /// When a sequence may start.
    pub policy: CapacityPolicy,
    /// Later sequences that may start before one that waits for its adapter.
    pub fairness_window: usize,
}
