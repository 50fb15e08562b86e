//! Checks requests and submits them to the engine thread.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::collect::OutputBuilder;
use super::input::GenerateRequest;
use super::output::RequestOutput;
use super::pending::Pending;
use super::prepare::{Prepared, prepare};
use crate::core::{Command, EventSink, Submission};
use crate::llm::adapters::Adapters;
use crate::llm::commands::Commands;
use crate::llm::{EngineInfo, LlmError};

/// Checks requests on the threads of their callers, and submits them to the engine thread.
pub(in crate::llm) struct Intake {
    info: EngineInfo,
    adapters: Adapters,
    commands: Commands,
    /// The next sequence id. A request has the id of its first sequence.
    next: AtomicU64,
}

impl Intake {
    pub fn new(info: EngineInfo, adapters: Adapters, commands: Commands) -> Self {
        Self { info, adapters, commands, next: AtomicU64::new(0) }
    }

    pub fn info(&self) -> &EngineInfo {
        &self.info
    }

    pub fn adapters(&self) -> &Adapters {
        &self.adapters
    }

    pub fn commands(&self) -> &Commands {
        &self.commands
    }

    /// Checks a request and submits its sequences, whose events go to `events`.
    ///
    /// # Errors
    /// Why the request is refused, or [`LlmError::Stopped`].
    pub(super) fn submit(
        &self,
        request: GenerateRequest,
        events: &Arc<dyn EventSink>,
    ) -> Result<Pending, LlmError> {
        let prepared = prepare(request, &self.info, &self.adapters)?;
        let echo = echo(&prepared)?;
        let mut outputs = HashMap::new();
        let mut submissions = Vec::with_capacity(prepared.plans.len());
        let request = self.next_id();
        for (index, plan) in prepared.plans.iter().enumerate() {
            let id = if index == 0 { request } else { self.next_id() };
            let tokenizer = prepared.model_text.tokenizer().ok();
            outputs.insert(id, OutputBuilder::new(index, &prepared.params, tokenizer)?);
            submissions.push(Submission {
                id,
                request,
                prompt: prepared.prompt.clone(),
                max_len: prepared.max_len,
                plan: plan.clone(),
                guide: prepared.guide.as_ref().map(|guide| Box::new(guide.fork())),
                adapter: prepared.adapter.clone(),
                siblings: Vec::new(),
                events: events.clone(),
            });
        }
        let siblings = submissions.split_off(1.min(submissions.len()));
        if let Some(first) = submissions.pop() {
            self.commands.send(Command::Submit(Box::new(Submission { siblings, ..first })))?;
        }
        let Prepared { text, prompt, params, .. } = prepared;
        let output = RequestOutput {
            request_id: request,
            prompt: text,
            prompt_token_ids: prompt,
            outputs: Vec::new(),
            prompt_logprobs: None,
            context_logits: None,
        };
        Ok(Pending { output, builders: outputs, params, failed: None, echo })
    }

    fn next_id(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

/// The prompt's text, for outputs that include the prompt.
fn echo(prepared: &Prepared) -> Result<String, LlmError> {
    let Prepared { text, model_text, prompt, params, .. } = prepared;
    match (text, model_text.tokenizer()) {
        (Some(text), _) => Ok(text.clone()),
        (None, Ok(tokenizer)) if params.detokenize && !params.exclude_input_from_output => {
            Ok(tokenizer.decode(prompt, params.skip_special_tokens)?)
        }
        _ => Ok(String::new()),
    }
}
