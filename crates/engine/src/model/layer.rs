//! A decoder layer: its parts, without the forward pass.

use lora_core::Backend;

use super::Norm;
use super::attention::Attention;
use super::ffn::Ffn;

/// One decoder layer.
pub struct Layer<B: Backend> {
    /// Norm before attention, `hidden` columns.
    pub input_norm: Norm<B>,
    /// Attention.
    pub attention: Attention<B>,
    /// Norm before the feed-forward network, `hidden` columns.
    pub post_norm: Norm<B>,
    /// The feed-forward network.
    pub ffn: Ffn<B>,
}
