//! What goes to the engine thread and what comes back.

use std::sync::Arc;

use crossbeam_channel::Sender;
use lora_core::Adapter;
use thiserror::Error;

use super::sink::EventSink;
use super::stats::EngineStats;
use crate::adapters::{ReadOutcome, Registered, RegistryError, Residence};
use crate::grammar::{GuideError, GuideMatcher};
use crate::sampling::{SamplingPlan, TokenLogprobs};

/// An order to the engine thread.
#[derive(Debug)]
pub enum Command {
    /// Run a sequence.
    Submit(Box<Submission>),
    /// End a sequence; it answers with [`EndReason::Cancelled`] unless it has ended.
    Abort(u64),
    /// End all sequences of a request, in the same way.
    AbortRequest(u64),
    /// An adapter was read for sequences that wait for it.
    Read(ReadOutcome),
    /// Take in an adapter that the user loaded.
    Install {
        /// Its registration.
        entry: Arc<Registered>,
        /// Its weights.
        adapter: Arc<Adapter>,
        /// Whether it stays in host memory whether used or not.
        pinned: bool,
        /// For whether it fits.
        reply: Sender<Result<(), Arc<RegistryError>>>,
    },
    /// Let an adapter go when its last sequence ends.
    Retire(Arc<Registered>),
    /// Tell where adapters are.
    Residence(Vec<Arc<Registered>>, Sender<Vec<Residence>>),
    /// Tell how it goes.
    Stats(Sender<EngineStats>),
    /// Stop at once.
    Shutdown,
}

/// One sequence to run. All limits were checked: the prompt is not empty and `max_len` fits the
/// KV cache.
#[derive(Debug)]
pub struct Submission {
    /// Unique number, repeated in every event.
    pub id: u64,
    /// Number of the request that it belongs to.
    pub request: u64,
    /// Token ids, each below the vocabulary size.
    pub prompt: Vec<u32>,
    /// Prompt and generated tokens together, at most.
    pub max_len: usize,
    /// How to draw.
    pub plan: Arc<SamplingPlan>,
    /// What its text must follow.
    pub guide: Option<Box<GuideMatcher>>,
    /// The adapter.
    pub adapter: Option<Arc<Registered>>,
    /// Other outputs of the same request; they start once this one has computed the prompt, and
    /// find it in the KV cache.
    pub siblings: Vec<Submission>,
    /// Where events go.
    pub events: Arc<dyn EventSink>,
}

/// Why a sequence failed.
#[derive(Clone, Debug, Error)]
pub enum SequenceError {
    /// Its adapter cannot be used.
    #[error(transparent)]
    Adapter(Arc<RegistryError>),
    /// Its guide leaves no token, or failed.
    #[error(transparent)]
    Guide(GuideError),
    /// The device failed in the step that ran it.
    #[error("{0}")]
    Step(String),
}

/// What happened to a sequence.
#[derive(Clone, Debug)]
pub enum Event {
    /// Prompt positions were computed: log-probabilities and logits as far as asked for.
    Prompt {
        /// For each position but the first: the token there, as predicted by those before.
        logprobs: Vec<TokenLogprobs>,
        /// `[vocab]` for each position.
        logits: Vec<Vec<f32>>,
    },
    /// A token was drawn.
    Token {
        /// Its id.
        id: u32,
        /// Its log-probability and the likeliest tokens'.
        logprobs: Option<TokenLogprobs>,
        /// `[vocab]` that it was drawn from.
        logits: Option<Vec<f32>>,
    },
    /// The last event of a sequence that ended.
    Finished(EndReason),
    /// The last event of a sequence that failed.
    Failed(SequenceError),
}

/// Why a sequence ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EndReason {
    /// The model's end token, its last token.
    End,
    /// A stop token, its last token.
    StopToken(u32),
    /// The limit of tokens.
    Length,
    /// It was aborted.
    Cancelled,
}
