//! The LLM API: requests in, tokens out, over any [`lora_core::Backend`].
//!
//! [`Llm`] is the entry point. Below it:
//!
//! - [`text`]: tokenizers, chat templates and stop strings;
//! - [`sampling`] and [`grammar`]: sampling parameters and guided decoding;
//! - [`adapters`]: the registry and the two-tier cache of adapters;
//! - [`scheduler`] and [`kv`]: continuous batching and the blocks of the KV cache;
//! - [`core`]: the batch loop;
//! - [`executor`] and [`model`]: running its steps, and the forward pass.
//!
//! The crate depends on no backend; the caller provides one.
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
