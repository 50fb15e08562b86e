//! What the layers of one forward pass have in common.

use lora_core::{Backend, View};

use super::ModelConfig;

/// A device, its group, and the constants of the model that it runs.
pub(super) struct Pass<'a, B: Backend> {
    pub be: &'a B,
    pub comm: &'a B::Comm,
    pub config: &'a ModelConfig,
    /// Cosines and sines of each position, `[positions, head_dim]` f32.
    pub cos_sin_table: View<'a, B>,
    pub tokens_per_block: usize,
}
