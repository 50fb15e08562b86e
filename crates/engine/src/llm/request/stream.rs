//! Streaming: a request whose outputs are delivered in pieces.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use futures_executor::block_on;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::input::GenerateRequest;
use super::intake::Intake;
use super::output::{Delta, RequestOutput};
use super::pending::{EventResult, Pending};
use crate::core::{Command, Event, EventSink};
use crate::llm::LlmError;
use crate::llm::commands::Commands;

/// A running request as a [`Stream`] of deltas, for any async runtime; [`ResponseStream::blocking`] is for
/// threads. The last delta of each output has a finish reason. An error ends the stream. Dropping the
/// stream aborts the request.
pub struct ResponseStream {
    state: State,
    inbox: UnboundedReceiver<(u64, Event)>,
    commands: Commands,
    request_id: u64,
}

/// State of a streamed request.
enum State {
    /// It runs, or all outputs have ended.
    Open(Box<Pending>),
    /// It failed, and the error was returned.
    Failed,
}

impl ResponseStream {
    /// Submits a request.
    ///
    /// # Errors
    /// Why the request is refused.
    pub(in crate::llm) fn open(
        intake: &Intake,
        request: GenerateRequest,
    ) -> Result<Self, LlmError> {
        let (events, inbox) = unbounded_channel();
        let events: Arc<dyn EventSink> = Arc::new(events);
        let pending = intake.submit(request, &events)?;
        let (request_id, commands) = (pending.output.request_id, intake.commands().clone());
        Ok(Self { state: State::Open(Box::new(pending)), inbox, commands, request_id })
    }

    /// Id of the request, for [`crate::Llm::abort`].
    pub fn request_id(&self) -> u64 {
        self.request_id
    }

    /// Aborts the request: its outputs end with [`crate::FinishReason::Cancelled`].
    pub fn abort(&self) {
        // Fails only if the engine has stopped, and then nothing runs.
        let _ = self.commands.send(Command::AbortRequest(self.request_id));
    }

    /// A blocking iterator over the deltas. Do not use it on a thread of an async runtime.
    pub fn blocking(&mut self) -> Blocking<'_> {
        Blocking(self)
    }

    /// Waits for the end and returns the complete result, including deltas that were read before.
    ///
    /// # Errors
    /// Why the request failed.
    pub async fn output(mut self) -> Result<RequestOutput, LlmError> {
        while let Some(delta) = poll_fn(|cx| Pin::new(&mut self).poll_next(cx)).await {
            delta?;
        }
        match std::mem::replace(&mut self.state, State::Failed) {
            State::Open(pending) => pending.into_output(),
            State::Failed => Err(LlmError::Stopped),
        }
    }

    /// Blocking version of [`ResponseStream::output`]. Do not use it on a thread of an async runtime.
    ///
    /// # Errors
    /// Why the request failed.
    pub fn finish(self) -> Result<RequestOutput, LlmError> {
        block_on(self.output())
    }

    /// Processes an event. Returns the item that it yields, if any.
    fn take(&mut self, id: u64, event: Event) -> Option<Result<Delta, LlmError>> {
        let State::Open(pending) = &mut self.state else { return None };
        let EventResult { delta, abort } = pending.take(id, event);
        let failed = pending.failed.take();
        if abort {
            let _ = self.commands.send(Command::Abort(id));
        }
        match failed {
            Some(error) => {
                self.abort();
                Some(Err(self.fail(error)))
            }
            None => delta.map(Ok),
        }
    }

    /// Marks the request as failed with this error.
    fn fail(&mut self, error: LlmError) -> LlmError {
        self.state = State::Failed;
        error
    }

    fn is_running(&self) -> bool {
        matches!(&self.state, State::Open(pending) if !pending.is_complete())
    }
}

impl Stream for ResponseStream {
    type Item = Result<Delta, LlmError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        while this.is_running() {
            let item = match ready!(this.inbox.poll_recv(cx)) {
                Some((id, event)) => this.take(id, event),
                None => Some(Err(this.fail(LlmError::Stopped))),
            };
            if item.is_some() {
                return Poll::Ready(item);
            }
        }
        Poll::Ready(None)
    }
}

/// A blocking iterator over the deltas of a [`ResponseStream`].
pub struct Blocking<'a>(&'a mut ResponseStream);

impl Iterator for Blocking<'_> {
    type Item = Result<Delta, LlmError>;

    fn next(&mut self) -> Option<Self::Item> {
        block_on(poll_fn(|cx| Pin::new(&mut *self.0).poll_next(cx)))
    }
}

impl Drop for ResponseStream {
    fn drop(&mut self) {
        if self.is_running() {
            self.abort();
        }
    }
}
