//! Running requests: all of a call are submitted at once, and share steps with those of others.

use std::collections::HashMap;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::collect::Growing;
use super::input::{GenerateRequest, PerPrompt, Prompt};
use super::output::{CompletionOutput, Logprobs, RequestOutput, logprobs_map};
use super::prepare::Prepared;
use super::{Llm, LlmError};
use crate::core::{Command, Event, Submission};
use crate::sampling::SamplingParams;
use lora_core::LoraRequest;

/// News of one output, for callers that show text as it comes.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// Position of the request in the call.
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

/// A request of a call while it runs.
struct Pending {
    output: RequestOutput,
    growing: HashMap<u64, Growing>,
    params: SamplingParams,
    failed: Option<LlmError>,
    /// The prompt as text, to stand before each output that repeats it.
    echo: String,
}

impl Llm {
    /// Continues every prompt, as the original's `generate`: adapters and parameters are one for
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
        let (events, inbox) = unbounded();
        let mut owners = HashMap::new();
        let mut pending: Vec<Result<Pending, LlmError>> = Vec::with_capacity(requests.len());
        for (position, request) in requests.into_iter().enumerate() {
            pending.push(self.submit(request, &events).inspect(|pending| {
                owners.extend(pending.growing.keys().map(|id| (*id, position)));
            }));
        }
        drop(events);
        self.drive(&inbox, &owners, &mut pending, watch);
        pending.into_iter().map(|request| request.and_then(Pending::into_output)).collect()
    }

    fn submit(
        &self,
        request: GenerateRequest,
        events: &Sender<(u64, Event)>,
    ) -> Result<Pending, LlmError> {
        let Prepared { text, prompt, max_len, plans, adapter, params } = self.prepare(request)?;
        let mut growing = HashMap::new();
        let mut submissions = Vec::with_capacity(plans.len());
        for (index, plan) in plans.into_iter().enumerate() {
            let id = self.next_id();
            growing.insert(id, Growing::new(index, &params, self.text.tokenizer().ok())?);
            submissions.push(Submission {
                id,
                prompt: prompt.clone(),
                max_len,
                plan,
                adapter: adapter.clone(),
                events: events.clone(),
            });
        }
        let request_id = submissions.first().map_or(0, |s| s.id);
        for submission in submissions {
            self.send(Command::Submit(Box::new(submission)))?;
        }
        let output = RequestOutput {
            request_id,
            prompt: text,
            prompt_token_ids: prompt,
            outputs: Vec::new(),
            prompt_logprobs: None,
            context_logits: None,
        };
        let echo = match (&output.prompt, self.text.tokenizer()) {
            (Some(prompt), _) => prompt.clone(),
            (None, Ok(tokenizer)) if params.detokenize && !params.exclude_input_from_output => {
                tokenizer.decode(&output.prompt_token_ids, params.skip_special_tokens)?
            }
            _ => String::new(),
        };
        Ok(Pending { output, growing, params, failed: None, echo })
    }

    /// Hands events to their requests until all have ended.
    fn drive(
        &self,
        inbox: &Receiver<(u64, Event)>,
        owners: &HashMap<u64, usize>,
        pending: &mut [Result<Pending, LlmError>],
        watch: &mut dyn FnMut(Update<'_>),
    ) {
        // The channel closes when the engine has dropped the last sequence.
        while let Ok((id, event)) = inbox.recv() {
            let Some(position) = owners.get(&id) else { continue };
            let Ok(request) = &mut pending[*position] else { continue };
            if request.take(id, event, *position, watch) {
                // The engine may be gone already; its silence ends the loop then.
                let _ = self.send(Command::Abort(id));
            }
        }
    }
}

impl Pending {
    /// Takes an event in. `true`: the sequence has to be aborted, as its output is complete.
    fn take(
        &mut self,
        id: u64,
        event: Event,
        request: usize,
        watch: &mut dyn FnMut(Update<'_>),
    ) -> bool {
        let Some(growing) = self.growing.get_mut(&id) else { return false };
        let output = growing.index();
        match event {
            Event::Prompt { logprobs, logits } => self.take_prompt(&logprobs, logits),
            Event::Token { id: token, logprobs, logits } => {
                match growing.push(token, logprobs, logits) {
                    Ok(grown) => {
                        let (piece, tokens) = (grown.piece.as_str(), growing.len());
                        watch(Update { request, output, piece, tokens, finished: false });
                        if grown.stopped {
                            self.end(id, crate::core::FinishReason::Cancelled, request, watch);
                            return true;
                        }
                    }
                    Err(error) => {
                        self.growing.remove(&id);
                        self.failed = Some(error.into());
                        return true;
                    }
                }
            }
            Event::Finished(reason) => self.end(id, reason, request, watch),
            Event::Failed(cause) => {
                self.growing.remove(&id);
                self.failed = Some(LlmError::Failed(cause));
            }
        }
        false
    }

    fn take_prompt(&mut self, logprobs: &[crate::core::TokenLogprobs], logits: Vec<Vec<f32>>) {
        if self.params.prompt_logprobs.is_some() {
            let all = self.output.prompt_logprobs.get_or_insert_with(|| vec![None]);
            all.extend(logprobs.iter().map(|entry| Some(logprobs_map(entry)) as Option<Logprobs>));
        }
        if self.params.return_context_logits {
            self.output.context_logits.get_or_insert_default().extend(logits);
        }
    }

    fn end(
        &mut self,
        id: u64,
        reason: crate::core::FinishReason,
        request: usize,
        watch: &mut dyn FnMut(Update<'_>),
    ) {
        let Some(growing) = self.growing.remove(&id) else { return };
        match growing.finish(reason) {
            Ok((output, piece)) => {
                let tokens = output.token_ids.len();
                let index = output.index;
                let piece = piece.as_str();
                watch(Update { request, output: index, piece, tokens, finished: true });
                self.output.outputs.push(output);
            }
            Err(error) => self.failed = Some(error.into()),
        }
    }

    fn into_output(mut self) -> Result<RequestOutput, LlmError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        if !self.growing.is_empty() {
            return Err(LlmError::Stopped);
        }
        keep_best(&mut self.output.outputs, &self.params);
        if !self.params.exclude_input_from_output {
            for output in &mut self.output.outputs {
                output.token_ids.splice(0..0, self.output.prompt_token_ids.iter().copied());
                output.text.insert_str(0, &self.echo);
            }
        }
        Ok(self.output)
    }
}

/// Keeps the `n` outputs of the highest cumulative log-probability, numbered from 0.
fn keep_best(outputs: &mut Vec<CompletionOutput>, params: &SamplingParams) {
    outputs.sort_by_key(|output| output.index);
    if outputs.len() <= params.n {
        return;
    }
    let sum = |output: &CompletionOutput| output.cumulative_logprob.unwrap_or(f32::NEG_INFINITY);
    outputs.sort_by(|a, b| sum(b).total_cmp(&sum(a)));
    outputs.truncate(params.n);
    for (index, output) in outputs.iter_mut().enumerate() {
        output.index = index;
        if params.logprobs.is_none() {
            (output.logprobs, output.cumulative_logprob) = (None, None);
        }
    }
}
