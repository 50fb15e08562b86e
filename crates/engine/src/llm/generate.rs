//! Running requests: all of a call are submitted at once, and share steps with those of others.

use std::collections::HashMap;

use crossbeam_channel::{Sender, unbounded};
use lora_core::LoraRequest;

use super::collect::OutputBuilder;
use super::input::{GenerateRequest, PerPrompt, Prompt};
use super::output::RequestOutput;
use super::pending::Pending;
use super::prepare::Prepared;
use super::stream::ResponseStream;
use super::{Llm, LlmError};
use crate::core::{Command, Event, Submission};
use crate::sampling::SamplingParams;

/// News of one output, for callers that show text as it comes.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// Position of the request in the call, or its number in its batch.
    pub request: usize,
    /// Number of the output among the request's.
    pub output: usize,
    /// Text since the last update; may be empty.
    pub piece: &'a str,
    /// Tokens generated so far.
    pub tokens: usize,
    /// Whether the output is complete.
    pub finished: bool,
}

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
    /// others. `watch` hears of every token.
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
        let (events, inbox) = unbounded();
        let pending = self.submit(request, &events)?;
        Ok(ResponseStream::new(pending, inbox, self.commands.clone()))
    }

    /// Ends a request; its outputs end with [`super::FinishReason::Cancelled`]. One that has ended,
    /// or never was, is left alone.
    ///
    /// # Errors
    /// [`LlmError::Stopped`].
    pub fn abort(&self, request_id: u64) -> Result<(), LlmError> {
        self.send(Command::AbortRequest(request_id))
    }

    pub(super) fn submit(
        &self,
        request: GenerateRequest,
        events: &Sender<(u64, Event)>,
    ) -> Result<Pending, LlmError> {
        let Prepared { text, model_text, prompt, max_len, plans, guide, adapter, params } =
            self.prepare(request)?;
        let mut growing = HashMap::new();
        let mut submissions = Vec::with_capacity(plans.len());
        let request = self.next_id();
        for (index, plan) in plans.into_iter().enumerate() {
            let id = if index == 0 { request } else { self.next_id() };
            growing.insert(id, OutputBuilder::new(index, &params, model_text.tokenizer().ok())?);
            submissions.push(Submission {
                id,
                request,
                prompt: prompt.clone(),
                max_len,
                plan,
                guide: guide.as_ref().map(|guide| Box::new(guide.fork())),
                adapter: adapter.clone(),
                siblings: Vec::new(),
                events: events.clone(),
            });
        }
        let siblings = submissions.split_off(1.min(submissions.len()));
        if let Some(first) = submissions.pop() {
            self.send(Command::Submit(Box::new(Submission { siblings, ..first })))?;
        }
        let output = RequestOutput {
            request_id: request,
            prompt: text,
            prompt_token_ids: prompt,
            outputs: Vec::new(),
            prompt_logprobs: None,
            context_logits: None,
        };
        let echo = match (&output.prompt, model_text.tokenizer()) {
            (Some(prompt), _) => prompt.clone(),
            (None, Ok(tokenizer)) if params.detokenize && !params.exclude_input_from_output => {
                tokenizer.decode(&output.prompt_token_ids, params.skip_special_tokens)?
            }
            _ => String::new(),
        };
        Ok(Pending { output, growing, params, failed: None, echo })
    }
}
