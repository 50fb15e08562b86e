//! Events that the engine thread reports about sequences.

use std::sync::Arc;

use thiserror::Error;

use crate::adapters::RegistryError;
use crate::grammar::GuideError;
use crate::sampling::TokenLogprobs;

/// Why a sequence failed.
#[derive(Clone, Debug, Error)]
pub enum SequenceError {
    /// Its adapter cannot be used.
    #[error(transparent)]
    Adapter(Arc<RegistryError>),
    /// Its guide allows no token, or failed.
    #[error(transparent)]
    Guide(GuideError),
    /// The device failed in a step that it was part of.
    #[error("{0}")]
    Step(String),
}

/// Progress of a sequence. [`Event::Finished`] or [`Event::Failed`] is its last event.
#[derive(Clone, Debug)]
pub enum Event {
    /// Prompt positions were computed. Carries the log-probabilities and logits that were asked for.
    Prompt {
        /// For each position but the first: the prompt token there, under the tokens before it.
        logprobs: Vec<TokenLogprobs>,
        /// `[vocab]` for each position.
        logits: Vec<Vec<f32>>,
    },
    /// A token was sampled.
    Token {
        /// Its id.
        id: u32,
        /// Its log-probability and those of the most probable tokens, if asked for.
        logprobs: Option<TokenLogprobs>,
        /// The logits it was sampled from, `[vocab]`, if asked for.
        logits: Option<Vec<f32>>,
    },
    /// The sequence ended.
    Finished(EndReason),
    /// The sequence failed.
    Failed(SequenceError),
}

/// Why a sequence ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EndReason {
    /// It sampled an end token, which is its last token.
    End,
    /// It sampled a stop token of the request, which is its last token.
    StopToken(u32),
    /// It reached its maximum length.
    Length,
    /// It was aborted.
    Cancelled,
}
