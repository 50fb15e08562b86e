//! Limits of a step, and the admission policy.

use serde::{Deserialize, Serialize};

/// When a waiting sequence is admitted, under TensorRT-LLM's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum CapacityPolicy {
    /// Once KV blocks for its maximum length can be reserved. It is then never preempted.
    #[default]
    GuaranteedNoEvict,
    /// Once KV blocks for its present tokens are free. If the running sequences need more blocks later, the
    /// most recently admitted one is preempted, and recomputed when it is admitted again.
    MaxUtilization,
}

/// Limits of a step, and the policy of admission.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most running sequences.
    pub max_batch_size: usize,
    /// Most rows (tokens) of one step; at least `max_batch_size`.
    pub max_num_tokens: usize,
    /// Most rows of one step that yield logits; at least `max_batch_size`.
    pub max_logit_rows: usize,
    /// When a waiting sequence is admitted.
    pub policy: CapacityPolicy,
    /// How often a sequence that waits for its adapter may be overtaken by later ones.
    pub fairness_window: usize,
}
