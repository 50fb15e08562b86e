//! The engine as its callers see it.

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

/// A model that runs on a thread of its own; calls from several threads share its batches.
/// Dropping it ends the thread.
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

    /// Facts about the engine.
    pub fn info(&self) -> &EngineInfo {
        self.intake.info()
    }

    /// Tokenizer, chat template and end tokens of the model.
    pub fn text(&self) -> &TextModel {
        self.adapters().model_text()
    }

    /// Counters of the engine, and how full its caches are.
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
    /// Continues every prompt, as TensorRT-LLM's `generate`: adapters and parameters are one for
    /// all prompts, or a list with an entry for each. Outputs keep the order of the prompts.
    ///
    /// # Errors
    /// [`LlmError::ListLength`] for a list of another length; otherwise the first request that
    /// failed. The others run to their end all the same; use [`Llm::generate_each`] to get them.
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

    /// Runs requests that each have their own parameters; one that fails does not touch the
    /// others. `watch` is called for every token.
    pub fn generate_each(
        &self,
        requests: Vec<GenerateRequest>,
        watch: &mut dyn FnMut(Update<'_>),
    ) -> Vec<Result<RequestOutput, LlmError>> {
        let mut batch = self.batch();
        // Positions of the requests that run, by their number in the batch.
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

    /// Runs a request and returns at once: its text comes in pieces, as TensorRT-LLM's
    /// `generate_async` with streaming. Dropping the stream aborts the request.
    ///
    /// # Errors
    /// Whatever refuses the request by itself; what happens later comes through the stream.
    pub fn generate_async(&self, request: GenerateRequest) -> Result<ResponseStream, LlmError> {
        ResponseStream::open(&self.intake, request)
    }

    /// A batch without requests, to which requests may be added while others run.
    pub fn batch(&self) -> Batch<'_> {
        Batch::new(&self.intake, &self.thread)
    }

    /// Ends a request; its outputs end with [`crate::FinishReason::Cancelled`]. One that has ended,
    /// or never was, is left alone.
    ///
    /// # Errors
    /// [`LlmError::Stopped`].
    pub fn abort(&self, request_id: u64) -> Result<(), LlmError> {
        self.intake.commands().send(Command::AbortRequest(request_id))
    }
}

/// Adapters.
impl Llm {
    /// Reads an adapter now, so that its first request does not wait for it. Under a known name the
    /// files are read again, with tokenizer, chat template and end tokens: later requests get the new
    /// contents, those in flight end with the old ones. `pinned` keeps it in host memory whether it is
    /// used or not.
    ///
    /// # Errors
    /// [`LlmError::Adapter`]; the engine then knows what it knew before.
    pub fn load_adapter(
        &self,
        request: &LoraRequest,
        pinned: bool,
    ) -> Result<AdapterStatus, LlmError> {
        self.adapters().load(request, pinned)
    }

    /// Makes an adapter known under its name and number, whose files are read when a request asks for
    /// it: from here on [`Llm::adapter`] gives it by name, and no other adapter can take either.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if the path does not exist, or another adapter has the name or number.
    pub fn register_adapter(&self, request: &LoraRequest) -> Result<(), LlmError> {
        self.adapters().resolve(request).map(drop)
    }

    /// The request for an adapter that was loaded or registered, by its name alone.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if no adapter has this name.
    pub fn adapter(&self, name: &str) -> Result<LoraRequest, LlmError> {
        self.adapters().named(name)
    }

    /// Tokenizer, chat template and end tokens of requests for an adapter: the model's, with what the
    /// adapter's folder has of its own.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if the adapter cannot be named so, or its files cannot be used.
    pub fn adapter_text(&self, lora: &LoraRequest) -> Result<Arc<TextModel>, LlmError> {
        let adapters = self.adapters();
        adapters.text_of(Some(&adapters.resolve(lora)?))
    }

    /// Forgets an adapter. Requests in flight end with it; its memory is then free.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if no adapter has this name.
    pub fn unload_adapter(&self, name: &str) -> Result<(), LlmError> {
        self.adapters().unload(name)
    }

    /// All adapters that requests or loads have named, by name.
    ///
    /// # Errors
    /// [`LlmError::Stopped`].
    pub fn list_adapters(&self) -> Result<Vec<AdapterStatus>, LlmError> {
        self.adapters().list()
    }
}
