//! Commands to the engine thread.

use std::sync::Arc;

use crossbeam_channel::Sender;
use lora_core::Adapter;

use super::sink::EventSink;
use super::stats::EngineStats;
use crate::adapters::{ReadOutcome, Registered, RegistryError, Residence};
use crate::grammar::GuideMatcher;
use crate::sampling::SamplingPlan;

/// A command to the engine thread.
#[derive(Debug)]
pub enum Command {
    /// Run a sequence.
    Submit(Box<Submission>),
    /// End a sequence with [`EndReason::Cancelled`](super::EndReason::Cancelled), unless it has ended
    /// already.
    Abort(u64),
    /// End all sequences of a request in the same way.
    AbortRequest(u64),
    /// A loader thread has read an adapter, or failed to.
    Read(ReadOutcome),
    /// Add an adapter that the user loaded.
    Install {
        /// Its registration.
        entry: Arc<Registered>,
        /// Its weights.
        adapter: Arc<Adapter>,
        /// Whether it is pinned to host memory.
        pinned: bool,
        /// Receives an error if the adapter does not fit the tiers.
        reply: Sender<Result<(), Arc<RegistryError>>>,
    },
    /// Remove an adapter once its last sequence has ended.
    Retire(Arc<Registered>),
    /// Report in which tiers adapters are.
    Residence(Vec<Arc<Registered>>, Sender<Vec<Residence>>),
    /// Report the engine's counters.
    Stats(Sender<EngineStats>),
    /// Stop. Running sequences fail.
    Shutdown,
}

/// One sequence to run. The sender has checked all limits: the prompt is not empty, and `max_len` tokens
/// fit the KV cache.
#[derive(Debug)]
pub struct Submission {
    /// Unique number of the sequence, passed to `events` with every event.
    pub id: u64,
    /// Number of the request that it belongs to.
    pub request: u64,
    /// Token ids, each below the vocabulary size.
    pub prompt: Vec<u32>,
    /// Maximum length: prompt and generated tokens together.
    pub max_len: usize,
    /// How to sample.
    pub plan: Arc<SamplingPlan>,
    /// The guide that its text must follow.
    pub guide: Option<Box<GuideMatcher>>,
    /// The adapter.
    pub adapter: Option<Arc<Registered>>,
    /// Other outputs of the same request (`n` or `best_of`). They are submitted once this sequence has
    /// computed the prompt, so that they find its keys and values in the KV cache.
    pub siblings: Vec<Submission>,
    /// Where events go.
    pub events: Arc<dyn EventSink>,
}
