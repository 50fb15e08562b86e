//! Requests to tokens: the LLM API over any [`lora_core::Backend`].
//!
//! [`Llm`] is the way in. Below it: [`text`] and [`sampling`] for what requests say, [`grammar`] for
//! the shape of their answers, [`adapters`] for what they run with, [`scheduler`] and [`kv`] for who
//! runs when, [`core`] for the batch loop, [`executor`] for what runs its steps,
//! [`model`] for the forward pass. No backend is named anywhere in this crate.
//!
//! Two prompts in one batch, one of them with an adapter:
//!
//! ```
//! use loramux_engine::{GenerateRequest, Llm};
//! use lora_core::{LoraConfig, LoraRequest};
//! use lora_cpu_ref::CpuRef;
//!
//! # fn main() -> Result<(), loramux_engine::LlmError> {
//! # let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures");
//! # let (model, adapter) = (format!("{fixtures}/models/llama"), format!("{fixtures}/adapters/llama.attn-r8"));
//! let llm = Llm::builder(model)
//!     .lora_config(LoraConfig::default())
//!     .build(|| CpuRef::with_threads(Some(1)))?;
//! llm.load_adapter(&LoraRequest::new("sql", 0, adapter), false)?;
//!
//! let requests = vec![
//!     GenerateRequest::new("How many books are there?").with_lora(llm.adapter("sql")?),
//!     GenerateRequest::new("How many books are there?"),
//! ];
//! for answer in llm.generate_each(requests, &mut |_| ()) {
//!     println!("{}", answer?.outputs[0].text);
//! }
//! # Ok(())
//! # }
//! ```
#![warn(missing_docs)]

pub mod adapters;
pub mod core;
pub mod executor;
pub mod grammar;
pub mod kv;
mod llm;
pub mod model;
pub mod sampling;
pub mod scheduler;
pub mod text;

pub use crate::core::EngineStats;
pub use llm::{
    AdapterStatus, AdapterText, AdapterTextError, Answered, BaseModel, Batch, Blocking,
    CompletionOutput, ConfigError, CudaGraphConfig, Delta, EngineConfig, EngineInfo, ErrorKind,
    FinishReason, GenerateRequest, KvCacheConfig, KvCacheDtype, Llm, LlmBuilder, LlmError,
    LoadFormat, Logprob, Logprobs, MemoryPlan, MoeConfig, PerPrompt, Progress, Prompt,
    RequestOutput, ResponseStream, SchedulerConfig, StopReason, TextChanges, TextModel, Update,
    geometry,
};
pub use sampling::{GuidedDecodingParams, SamplingParams};
pub use scheduler::CapacityPolicy;
