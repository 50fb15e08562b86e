//! Requests that run together and may be added while others run.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use super::input::GenerateRequest;
use super::intake::Intake;
use super::output::{RequestOutput, Update};
use super::pending::{Pending, Taken};
use crate::core::{Command, Event};
use crate::llm::LlmError;
use crate::llm::commands::EngineThread;

/// Requests of one caller. Each is given a number when it is added, from 0, and its answer comes
/// once it is complete, in whatever order the requests end. Dropping the batch aborts what still runs.
pub struct Batch<'a> {
    intake: &'a Intake,
    thread: &'a EngineThread,
    /// For the sequences of further requests; `None` once there will be none, so that the channel
    /// closes when the engine has dropped the last sequence.
    events: Option<Sender<(u64, Event)>>,
    inbox: Receiver<(u64, Event)>,
    /// Request of each sequence that runs.
    owners: HashMap<u64, usize>,
    running: HashMap<usize, Pending>,
    added: usize,
}

/// A request that has ended: its number, and its answer or what failed it.
pub type Answered = (usize, Result<RequestOutput, LlmError>);

impl<'a> Batch<'a> {
    /// A batch without requests.
    pub(in crate::llm) fn new(intake: &'a Intake, thread: &'a EngineThread) -> Self {
        let (events, inbox) = unbounded();
        let (owners, running) = (HashMap::new(), HashMap::new());
        Self { intake, thread, events: Some(events), inbox, owners, running, added: 0 }
    }

    /// Adds a request, which runs at once, and returns its number.
    ///
    /// # Errors
    /// Whatever refuses the request by itself; it takes no number then. [`LlmError::Stopped`] after
    /// [`Batch::close`].
    pub fn add(&mut self, request: GenerateRequest) -> Result<usize, LlmError> {
        let events = self.events.as_ref().ok_or(LlmError::Stopped)?;
        let pending = self.intake.submit(request, Arc::new(events.clone()))?;
        let number = self.added;
        self.added += 1;
        self.owners.extend(pending.builders.keys().map(|id| (*id, number)));
        self.running.insert(number, pending);
        Ok(number)
    }

    /// Says that no request will be added.
    pub fn close(&mut self) {
        self.events = None;
    }

    /// Requests that have not ended.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Ends all requests that run; their outputs end with [`crate::FinishReason::Cancelled`].
    pub fn abort(&self) {
        for pending in self.running.values() {
            // An engine that is gone runs nothing.
            let _ = self.intake.commands().send(Command::AbortRequest(pending.output.request_id));
        }
    }

    /// Waits up to `limit` for a request to end; `None` if none did, or none runs. `watch` hears of
    /// every token.
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
                // While requests can be added, the channel stays open though nobody may write to it.
                Err(RecvTimeoutError::Timeout) if self.thread.is_running() => return None,
                Err(_) => return self.stopped(),
            }
        }
        None
    }

    /// Waits for a request to end; `None` if none runs.
    pub fn next(&mut self, watch: &mut dyn FnMut(Update<'_>)) -> Option<Answered> {
        while !self.running.is_empty() {
            let answered = self.next_within(LOOK_AGAIN, watch);
            if answered.is_some() {
                return answered;
            }
        }
        None
    }

    /// Hands an event to its request, and returns the request if that was its last one.
    fn take(
        &mut self,
        id: u64,
        event: Event,
        watch: &mut dyn FnMut(Update<'_>),
    ) -> Option<Answered> {
        let number = *self.owners.get(&id)?;
        let pending = self.running.get_mut(&number)?;
        let Taken { delta, abort } = pending.take(id, event);
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
            // The engine may be gone already; that is noticed when the next event does not come.
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

    /// A request that the engine will not end, as it has stopped.
    fn stopped(&mut self) -> Option<Answered> {
        let number = *self.running.keys().min()?;
        self.running.remove(&number).map(|pending| (number, pending.into_output()))
    }
}

/// How often a caller that waits without a limit looks whether the engine still runs.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.abort();
    }
}
