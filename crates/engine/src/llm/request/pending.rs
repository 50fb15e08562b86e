//! A running request: builds its outputs from events.

use std::collections::HashMap;

use super::collect::OutputBuilder;
use super::output::{CompletionOutput, Delta, Logprobs, RequestOutput, logprobs_map};
use crate::core::{EndReason, Event};
use crate::llm::LlmError;
use crate::sampling::{SamplingParams, TokenLogprobs};

/// A running request.
pub(super) struct Pending {
    pub output: RequestOutput,
    /// Outputs that have not ended, by the id of their sequence.
    pub builders: HashMap<u64, OutputBuilder>,
    pub params: SamplingParams,
    pub failed: Option<LlmError>,
    /// The prompt's text, for outputs that include the prompt.
    pub echo: String,
}

/// Result of an event.
#[derive(Default)]
pub(super) struct EventResult {
    /// What the output has gained.
    pub delta: Option<Delta>,
    /// Whether the sequence has to be aborted: its output is complete, or has failed, before the engine ended
    /// it.
    pub abort: bool,
}

impl Pending {
    /// Whether all outputs have ended.
    pub fn is_complete(&self) -> bool {
        self.builders.is_empty()
    }

    /// Processes an event of sequence `id`.
    pub fn take(&mut self, id: u64, event: Event) -> EventResult {
        let Some(builder) = self.builders.get_mut(&id) else { return EventResult::default() };
        match event {
            Event::Prompt { logprobs, logits } => {
                self.take_prompt(&logprobs, logits);
                EventResult::default()
            }
            Event::Token { id: token, logprobs, logits } => {
                let shown = logprobs.as_ref().filter(|_| self.params.logprobs.is_some());
                let shown = shown.map(logprobs_map).into_iter().collect();
                let pushed = match builder.push(token, logprobs, logits) {
                    Ok(pushed) => pushed,
                    Err(error) => {
                        self.fail(id, error.into());
                        return EventResult { abort: true, delta: None };
                    }
                };
                let mut delta = Delta {
                    output: builder.index(),
                    text: pushed.piece,
                    token_ids: vec![token],
                    logprobs: shown,
                    tokens: builder.len(),
                    finish_reason: None,
                    stop_reason: None,
                };
                if pushed.stopped {
                    let end = self.end(id, EndReason::Cancelled);
                    delta.absorb(end);
                }
                EventResult { delta: Some(delta), abort: pushed.stopped }
            }
            Event::Finished(reason) => EventResult { delta: self.end(id, reason), abort: false },
            Event::Failed(cause) => {
                self.fail(id, cause.into());
                EventResult::default()
            }
        }
    }

    fn fail(&mut self, id: u64, error: LlmError) {
        self.builders.remove(&id);
        self.failed = Some(error);
    }

    fn take_prompt(&mut self, logprobs: &[TokenLogprobs], logits: Vec<Vec<f32>>) {
        if self.params.prompt_logprobs.is_some() {
            let all = self.output.prompt_logprobs.get_or_insert_with(|| vec![None]);
            all.extend(logprobs.iter().map(|entry| Some(logprobs_map(entry)) as Option<Logprobs>));
        }
        if self.params.return_context_logits {
            self.output.context_logits.get_or_insert_default().extend(logits);
        }
    }

    fn end(&mut self, id: u64, reason: EndReason) -> Option<Delta> {
        let builder = self.builders.remove(&id)?;
        match builder.finish(reason) {
            Ok((output, piece)) => {
                let delta = Delta {
                    output: output.index,
                    text: piece,
                    token_ids: Vec::new(),
                    logprobs: Vec::new(),
                    tokens: output.token_ids.len(),
                    finish_reason: Some(output.finish_reason),
                    stop_reason: output.stop_reason.clone(),
                };
                self.output.outputs.push(output);
                Some(delta)
            }
            Err(error) => {
                self.failed = Some(error.into());
                None
            }
        }
    }

    /// The result, once all outputs have ended.
    ///
    /// # Errors
    /// Why the request failed, or [`LlmError::Stopped`] if outputs have not ended.
    pub fn into_output(mut self) -> Result<RequestOutput, LlmError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        if !self.builders.is_empty() {
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

/// Keeps the `n` outputs with the highest cumulative log-probability, and renumbers them from 0.
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
