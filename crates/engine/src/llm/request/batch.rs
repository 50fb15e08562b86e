//! A batch of requests, to which requests may be added while others run.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, unbounded};

use super::input::GenerateRequest;
use super::intake::Intake;
use super::output::{RequestOutput, Update};
use super::pending::{EventResult, Pending};
use crate::core::{Command, Event, EventSink};
use crate::llm::LlmError;
use crate::llm::commands::EngineThread;

/// Requests of one caller. Each gets a number when it is added, from 0. Results are returned in the order in
/// which requests end. Dropping the batch aborts the requests that still run.
pub struct Batch<'a> {
    intake: &'a Intake,
    thread: &'a EngineThread,
    /// Event sender for further requests; `None` after [`Batch::close`], so that the channel closes when the
    /// engine has dropped the last sequence.
    events: Option<Arc<dyn EventSink>>,
    inbox: Receiver<(u64, Event)>,
    /// Number of the request that each running sequence belongs to.
    owners: HashMap<u64, usize>,
    running: HashMap<usize, Pending>,
    added: usize,
}

/// A request that has ended: its number and its result.
pub type Answered = (usize, Result<RequestOutput, LlmError>);

impl<'a> Batch<'a> {
    /// An empty batch.
    pub(in crate::llm) fn new(intake: &'a Intake, thread: &'a EngineThread) -> Self {
        let (events, inbox) = unbounded();
        let (owners, running) = (HashMap::new(), HashMap::new());
        Self { intake, thread, events: Some(Arc::new(events)), inbox, owners, running, added: 0 }
    }

    /// Submits a request and returns its number.
    ///
    /// # Errors
    /// Why the request is refused, in which case it gets no number. [`LlmError::Stopped`] after
    /// [`Batch::close`].
    pub fn add(&mut self, request: GenerateRequest) -> Result<usize, LlmError> {
        let events = self.events.as_ref().ok_or(LlmError::Stopped)?;
        let pending = self.intake.submit(request, events)?;
        let number = self.added;
        self.added += 1;
        self.owners.extend(pending.builders.keys().map(|id| (*id, number)));
        self.running.insert(number, pending);
        Ok(number)
    }

    /// Declares that no request will be added.
    pub fn close(&mut self) {
        self.events = None;
    }

    /// Number of requests that have not ended.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Aborts all running requests: their outputs end with [`crate::FinishReason::Cancelled`].
    pub fn abort(&self) {
        for pending in self.running.values() {
            // Fails only if the engine has stopped, and then nothing runs.
            let _ = self.intake.commands().send(Command::AbortRequest(pending.output.request_id));
        }
    }

    /// Waits up to `limit` for a request to end. Returns `None` if none ended, or none runs. `watch` is called
    /// for every token.
    pub fn next_within(
        &mut self,
        limit: Duration,
        watch: &mut dyn FnMut(Update<'_>),
    ) -> Option<Answered> {
        let deadline = std::time::Instant::now() + limit;
        while !self.running.is_empty() {
            match self.inbox.recv_deadline(deadline) {
                Ok((id, event)) => {
                    if let Some(answered) = self.take(id, event, watch) {
                        return Some(answered);
                    }
                }
                // The batch itself may hold a sender, so a stopped engine does not close the channel.
                Err(RecvTimeoutError::Timeout) if self.thread.is_running() => return None,
                Err(_) => return self.stopped(),
            }
        }
        None
    }

    /// Waits for a request to end. Returns `None` if none runs.
    pub fn next(&mut self, watch: &mut dyn FnMut(Update<'_>)) -> Option<Answered> {
        while !self.running.is_empty() {
            let answered = self.next_within(CHECK_INTERVAL, watch);
            if answered.is_some() {
                return answered;
            }
        }
        None
    }

    /// Passes an event to its request. Returns the result if it was the request's last event.
    fn take(
        &mut self,
        id: u64,
        event: Event,
        watch: &mut dyn FnMut(Update<'_>),
    ) -> Option<Answered> {
        let number = *self.owners.get(&id)?;
        let pending = self.running.get_mut(&number)?;
        let EventResult { delta, abort } = pending.take(id, event);
        if let Some(delta) = delta {
            watch(Update {
                request: number,
                output: delta.output,
                piece: &delta.text,
                tokens: delta.tokens,
                finished: delta.finish_reason.is_some(),
            });
        }
        if abort {
            // Fails only if the engine has stopped, which the wait for the next event notices.
            let _ = self.intake.commands().send(Command::Abort(id));
        }
        if !pending.builders.contains_key(&id) {
            self.owners.remove(&id);
        }
        if !pending.is_complete() {
            return None;
        }
        self.running.remove(&number).map(|pending| (number, pending.into_output()))
    }

    /// Ends a running request with an error, as the engine has stopped.
    fn stopped(&mut self) -> Option<Answered> {
        let number = *self.running.keys().min()?;
        self.running.remove(&number).map(|pending| (number, pending.into_output()))
    }
}

/// How often a caller that waits without a limit checks whether the engine still runs.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.abort();
    }
}
