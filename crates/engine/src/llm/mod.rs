//! The LLM API, modelled on TensorRT-LLM's: [`Llm`] with `generate`, its inputs and outputs.

mod adapters;
mod api;
mod commands;
mod error;
mod info;
mod request;
mod startup;
mod text;

pub use adapters::AdapterStatus;
pub use api::Llm;
pub use error::{ErrorKind, LlmError};
pub use info::EngineInfo;
pub use request::{
    Answered, Batch, Blocking, CompletionOutput, Delta, FinishReason, GenerateRequest, Logprob,
    Logprobs, PerPrompt, Prompt, RequestOutput, ResponseStream, StopReason, Update,
};
pub use startup::{
    BaseModel, ConfigError, CudaGraphConfig, EngineConfig, KvCacheConfig, KvCacheDtype, LlmBuilder,
    LoadFormat, MemoryPlan, MoeConfig, Progress, SchedulerConfig, geometry,
};
pub use text::{AdapterText, AdapterTextError, TextChanges, TextModel};
