//! Context shared by the layers of a forward pass.

use lora_core::{Backend, View};

use super::ModelConfig;

/// The device, its group, and the model's constants.
pub(super) struct Pass<'a, B: Backend> {
    pub be: &'a B,
    pub comm: &'a B::Comm,
    pub config: &'a ModelConfig,
    /// Cosines and sines of each position, `[positions, head_dim]` f32.
    pub cos_sin_table: View<'a, B>,
    pub tokens_per_block: usize,
}
