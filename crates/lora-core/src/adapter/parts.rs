//! Parts of an adapter beside the update of a matrix: norms, and rows of the vocabulary.

use std::fmt;

use crate::device::HostTensor;

/// A norm of a decoder layer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum NormKind {
    /// Before attention.
    Input,
    /// Before the MLP.
    PostAttention,
    /// Of the heads of queries.
    Query,
    /// Of the heads of keys.
    Key,
}

impl NormKind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Input, Self::PostAttention, Self::Query, Self::Key];

    /// Its path inside a layer, as Hugging Face names it.
    pub const fn hf_path(self) -> &'static str {
        match self {
            Self::Input => "input_layernorm",
            Self::PostAttention => "post_attention_layernorm",
            Self::Query => "self_attn.q_norm",
            Self::Key => "self_attn.k_norm",
        }
    }

    /// The norm of a path inside a layer.
    pub fn from_hf_path(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.hf_path() == path)
    }

    /// Whether it normalises heads rather than the residual stream.
    pub const fn is_of_heads(self) -> bool {
        matches!(self, Self::Query | Self::Key)
    }
}

impl fmt::Display for NormKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.hf_path())
    }
}

/// Rows of the vocabulary that take the place of the base layer's, as PEFT's
/// `trainable_token_indices` trains them.
#[derive(Clone, PartialEq, Debug)]
pub struct TokenRows<T = HostTensor> {
    /// The tokens, ascending, each once.
    pub ids: Vec<u32>,
    /// A row for each of them: `[ids, hidden]`.
    pub values: T,
}
