//! Places in a model that an adapter can change.

use std::fmt;

use super::TargetModule;
use crate::ids::LayerIdx;

/// A place in a model that an adapter can change.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SiteKey {
    /// The token embedding.
    Embed,
    /// A linear module of a decoder layer.
    Layer(LayerIdx, TargetModule),
    /// A norm of a decoder layer.
    Norm(LayerIdx, NormKind),
    /// The norm after the last layer.
    FinalNorm,
    /// The output projection (`lm_head`).
    Head,
}

impl SiteKey {
    /// The target module of a linear site in a layer.
    pub const fn module(self) -> Option<TargetModule> {
        match self {
            Self::Layer(_, module) => Some(module),
            Self::Embed | Self::Norm(..) | Self::FinalNorm | Self::Head => None,
        }
    }

    /// The layer that it belongs to.
    pub const fn layer(self) -> Option<LayerIdx> {
        match self {
            Self::Layer(layer, _) | Self::Norm(layer, _) => Some(layer),
            Self::Embed | Self::FinalNorm | Self::Head => None,
        }
    }

    /// The name of its module in Hugging Face models. `root` is the part before `layers`; `path` is the
    /// path of a linear module inside its layer, without which the name of such a module is `None`.
    pub fn hf_name(self, root: &str, path: Option<&str>) -> Option<String> {
        Some(match self {
            Self::Embed => format!("{root}embed_tokens"),
            Self::Layer(layer, _) => format!("{root}layers.{}.{}", layer.0, path?),
            Self::Norm(layer, kind) => format!("{root}layers.{}.{}", layer.0, kind.hf_path()),
            Self::FinalNorm => format!("{root}norm"),
            Self::Head => "lm_head".to_owned(),
        })
    }

    /// Whether it is a norm.
    pub const fn is_norm(self) -> bool {
        matches!(self, Self::Norm(..) | Self::FinalNorm)
    }
}

impl fmt::Display for SiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embed => f.write_str("embed_tokens"),
            Self::Layer(layer, module) => write!(f, "layer {layer} {module}"),
            Self::Norm(layer, kind) => write!(f, "layer {layer} {kind}"),
            Self::FinalNorm => f.write_str("norm"),
            Self::Head => f.write_str("lm_head"),
        }
    }
}

/// A norm of a decoder layer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum NormKind {
    /// Before attention.
    Input,
    /// Before the MLP.
    PostAttention,
    /// Of query heads.
    Query,
    /// Of key heads.
    Key,
}

impl NormKind {
    /// Every kind, in the order of the discriminants.
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

    /// The norm with this path inside a layer.
    pub fn from_hf_path(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.hf_path() == path)
    }

    /// Whether it is a QK norm, which normalises heads rather than the residual stream.
    pub const fn is_of_heads(self) -> bool {
        matches!(self, Self::Query | Self::Key)
    }
}

impl fmt::Display for NormKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.hf_path())
    }
}
