//! Requests to tokens: the LLM API over any [`lora_core::Backend`].
//!
//! [`Llm`] is the way in. Below it: [`text`] and [`sampling`] for what requests say, [`grammar`] for
//! the shape of their answers, [`adapters`] for what they run with, [`scheduler`] and [`kv`] for who
//! runs when, [`core`] for the batch loop, [`model`] for the forward pass. No backend is named anywhere in this crate.
#![warn(missing_docs)]

pub mod adapters;
pub mod core;
pub mod grammar;
pub mod kv;
mod llm;
pub mod model;
pub mod sampling;
pub mod scheduler;
pub mod text;

pub use crate::core::EngineStats;
pub use llm::{
    AdapterStatus, AdapterText, AdapterTextError, BaseModel, CompletionOutput, Delta, EngineInfo,
    FinishReason, GenerateRequest, KvCacheConfig, KvCacheDtype, Llm, LlmBuilder, LlmError,
    LoadFormat, Logprob, Logprobs, MemoryPlan, News, PerPrompt, Progress, Prompt, RequestOutput,
    ResponseStream, SchedulerConfig, StopReason, TextChanges, TextModel, Update, geometry,
};
pub use sampling::{GuidedDecodingParams, SamplingParams};
pub use scheduler::CapacityPolicy;
