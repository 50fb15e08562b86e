//! The LLM API, after TensorRT-LLM's: [`Llm`] with `generate`, its inputs and outputs.

mod adapter_text;
mod adapter_text_rules;
mod adapter_texts;
mod adapters;
mod base_model;
mod batch;
mod buffers;
mod builder;
mod checkpoint;
mod collect;
mod error;
mod generate;
mod geometry;
mod guides;
mod input;
mod launch;
mod lora_settings;
mod memory;
mod output;
mod pending;
mod prepare;
mod quantize;
mod rank;
mod settings;
mod sizes;
mod stream;
mod text_changes;
mod text_model;
mod token_pool;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};
use lora_core::{DType, ModelGeometry, QuantAlgo};

pub use adapter_text::{AdapterText, AdapterTextError};
pub use adapters::AdapterStatus;
pub use base_model::BaseModel;
pub use batch::{Answered, Batch};
pub use builder::{LlmBuilder, Progress};
pub use error::LlmError;
pub use generate::Update;
pub use geometry::geometry;
pub use input::{GenerateRequest, PerPrompt, Prompt};
pub use memory::MemoryPlan;
pub use output::{
    CompletionOutput, Delta, FinishReason, Logprob, Logprobs, RequestOutput, StopReason,
};
pub use settings::{KvCacheConfig, KvCacheDtype, LoadFormat, SchedulerConfig};
pub use stream::{News, ResponseStream};
pub use text_changes::TextChanges;
pub use text_model::TextModel;

use crate::adapters::AdapterRegistry;
use crate::core::{Command, EngineStats};
use crate::model::ModelConfig;

/// Facts about a running engine.
#[derive(Clone, Debug)]
pub struct EngineInfo {
    /// Shape and constants of the model.
    pub model: ModelConfig,
    /// The same, as adapters see it.
    pub geometry: ModelGeometry,
    /// Dtype of the activations.
    pub dtype: DType,
    /// Algorithm of the base weights; `None`: they are in 16 or 32 bits.
    pub quant_algo: Option<QuantAlgo>,
    /// Dtype of keys and values.
    pub kv_dtype: DType,
    /// Name of the backend.
    pub backend: &'static str,
    /// Prompt and answer together, at most, in tokens.
    pub max_seq_len: usize,
    /// Sequences that run at a time.
    pub max_batch_size: usize,
    /// Tokens that fit the KV cache.
    pub kv_tokens: usize,
    /// What the device's memory is for.
    pub memory: MemoryPlan,
}

/// A model that runs on a thread of its own; calls from several threads share its batches.
/// Dropping it ends the thread.
pub struct Llm {
    info: Arc<EngineInfo>,
    texts: adapter_texts::AdapterTexts,
    registry: Arc<AdapterRegistry>,
    commands: builder::Commands,
    ids: AtomicU64,
    thread: Option<JoinHandle<()>>,
}

impl Llm {
    /// Settings for an engine of the model at `model`: a folder with `config.json` and
    /// safetensors, or a `.gguf` file.
    pub fn builder(model: impl Into<PathBuf>) -> LlmBuilder {
        LlmBuilder::new(model.into())
    }

    /// Facts about the engine.
    pub fn info(&self) -> &EngineInfo {
        &self.info
    }

    /// Tokenizer, chat template and end tokens of the model.
    pub fn text(&self) -> &TextModel {
        self.texts.model()
    }

    /// How the engine is doing.
    ///
    /// # Errors
    /// [`LlmError::Stopped`].
    pub fn stats(&self) -> Result<EngineStats, LlmError> {
        self.ask(Command::Stats)
    }

    /// Sends a command that is answered, and waits for the answer.
    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, LlmError> {
        let (reply, answer) = bounded(1);
        self.send(command(reply))?;
        answer.recv().map_err(|_| LlmError::Stopped)
    }

    /// Whether the engine's thread runs.
    fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    fn send(&self, command: Command) -> Result<(), LlmError> {
        self.commands.send(command).map_err(|_| LlmError::Stopped)
    }
}

impl Drop for Llm {
    fn drop(&mut self) {
        // Either fails only if the thread has ended, which is what is wanted.
        let _ = self.commands.send(Command::Shutdown);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
