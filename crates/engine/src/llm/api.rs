//! [`Llm`], the public interface of an engine.

use std::path::PathBuf;
use std::sync::Arc;

use lora_core::LoraRequest;

use super::adapters::{AdapterStatus, Adapters};
use super::commands::EngineThread;
use super::request::{
    Batch, GenerateRequest, Intake, PerPrompt, Prompt, RequestOutput, ResponseStream, Update,
};
use super::startup::LlmBuilder;
use super::text::TextModel;
use super::{EngineInfo, LlmError};
use crate::core::{Command, EngineStats};
use crate::sampling::SamplingParams;

/// An engine: a model on a thread of its own. Requests from several threads share its batches. Dropping it
/// stops the engine.
pub struct Llm {
    intake: Intake,
    thread: EngineThread,
}

impl Llm {
    /// Settings for an engine of the model at `model`: a folder with `config.json` and
    /// safetensors, or a `.gguf` file.
    pub fn builder(model: impl Into<PathBuf>) -> LlmBuilder {
        LlmBuilder::new(model.into())
    }

    pub(super) fn new(intake: Intake, thread: EngineThread) -> Self {
        Self { intake, thread }
    }

    /// Configuration and sizes of the engine.
    pub fn info(&self) -> &EngineInfo {
        self.intake.info()
    }

    /// Tokenizer, chat template and end tokens of the model.
    pub fn text(&self) -> &TextModel {
        self.adapters().model_text()
    }

    /// Counters of the engine, and the fill of its caches.
    ///
    /// # Errors
    /// [`LlmError::Stopped`].
    pub fn stats(&self) -> Result<EngineStats, LlmError> {
        self.intake.commands().ask(Command::Stats)
    }

    fn adapters(&self) -> &Adapters {
        self.intake.adapters()
    }
}

/// Requests.
impl Llm {
    /// Generates for every prompt, as TensorRT-LLM's `generate`. Sampling parameters and adapters are given
    /// once for all prompts, or as a list with an entry for each. Outputs are in the order of the prompts.
    ///
    /// # Errors
    /// [`LlmError::ListLength`] for a list of another length; otherwise the error of the first request that
    /// failed. The other requests still run; [`Llm::generate_each`] returns their outputs, too.
    pub fn generate(
        &self,
        prompts: impl IntoIterator<Item = impl Into<Prompt>>,
        sampling: impl Into<PerPrompt<SamplingParams>>,
        lora: impl Into<PerPrompt<Option<LoraRequest>>>,
    ) -> Result<Vec<RequestOutput>, LlmError> {
        let prompts: Vec<Prompt> = prompts.into_iter().map(Into::into).collect();
        let sampling = sampling.into().expand("sampling_params", prompts.len())?;
        let lora = lora.into().expand("lora_request", prompts.len())?;
        let requests = prompts
            .into_iter()
            .zip(sampling)
            .zip(lora)
            .map(|((prompt, sampling), lora)| GenerateRequest { prompt, sampling, lora })
            .collect();
        self.generate_each(requests, &mut |_| ()).into_iter().collect()
    }

    /// Runs requests with individual parameters, each with its own result. `watch` is called for every
    /// token.
    pub fn generate_each(
        &self,
        requests: Vec<GenerateRequest>,
        watch: &mut dyn FnMut(Update<'_>),
    ) -> Vec<Result<RequestOutput, LlmError>> {
        let mut batch = self.batch();
        // Positions in `requests` of the requests that were accepted, by their number in the batch.
        let mut positions = Vec::with_capacity(requests.len());
        let mut answers: Vec<Result<RequestOutput, LlmError>> = Vec::with_capacity(requests.len());
        for (position, request) in requests.into_iter().enumerate() {
            let added = batch.add(request).map(|_| positions.push(position));
            answers.push(added.and(Err(LlmError::Stopped)));
        }
        batch.close();
        let mut watch = |update: Update<'_>| {
            watch(Update { request: positions[update.request], ..update });
        };
        while let Some((number, answer)) = batch.next(&mut watch) {
            answers[positions[number]] = answer;
        }
        answers
    }

    /// Submits a request and streams its outputs, as TensorRT-LLM's `generate_async` with streaming.
    /// Dropping the stream aborts the request.
    ///
    /// # Errors
    /// Why the request is refused. Later errors are items of the stream.
    pub fn generate_async(&self, request: GenerateRequest) -> Result<ResponseStream, LlmError> {
        ResponseStream::open(&self.intake, request)
    }

    /// An empty batch. Requests may be added to it while others run.
    pub fn batch(&self) -> Batch<'_> {
        Batch::new(&self.intake, &self.thread)
    }

    /// Aborts a request: its outputs end with [`crate::FinishReason::Cancelled`]. Does nothing for a request
    /// that has ended or does not exist.
    ///
    /// # Errors
    /// [`LlmError::Stopped`].
    pub fn abort(&self, request_id: u64) -> Result<(), LlmError> {
        self.intake.commands().send(Command::AbortRequest(request_id))
    }
}

/// Adapters.
impl Llm {
    /// Reads an adapter now, so that its first request does not wait for it. If the name is registered, its
    /// files are read again (weights, tokenizer, chat template and end tokens): later requests use the new
    /// contents, those in flight finish with the old ones. `pinned` exempts it from eviction from host memory.
    ///
    /// # Errors
    /// [`LlmError::Adapter`]; a previous registration of the name then stays.
    pub fn load_adapter(
        &self,
        request: &LoraRequest,
        pinned: bool,
    ) -> Result<AdapterStatus, LlmError> {
        self.adapters().load(request, pinned)
    }

    /// Registers an adapter without reading its weights, which happens when a request uses it. From then on
    /// [`Llm::adapter`] finds it by name, and no other adapter can take its name or id.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if the path does not exist, or another adapter has the name or id.
    pub fn register_adapter(&self, request: &LoraRequest) -> Result<(), LlmError> {
        self.adapters().resolve(request).map(drop)
    }

    /// The request for a loaded or registered adapter, by name.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if no adapter has this name.
    pub fn adapter(&self, name: &str) -> Result<LoraRequest, LlmError> {
        self.adapters().named(name)
    }

    /// Tokenizer, chat template and end tokens for requests with an adapter: the model's, except where the
    /// adapter's folder has its own.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if the adapter cannot be registered, or its files cannot be used.
    pub fn adapter_text(&self, lora: &LoraRequest) -> Result<Arc<TextModel>, LlmError> {
        let adapters = self.adapters();
        adapters.text_of(Some(&adapters.resolve(lora)?))
    }

    /// Unregisters an adapter. Requests in flight still finish with it; then its memory is freed.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if no adapter has this name.
    pub fn unload_adapter(&self, name: &str) -> Result<(), LlmError> {
        self.adapters().unload(name)
    }

    /// All registered adapters, sorted by name.
    ///
    /// # Errors
    /// [`LlmError::Stopped`].
    pub fn list_adapters(&self) -> Result<Vec<AdapterStatus>, LlmError> {
        self.adapters().list()
    }
}
