//! A request whose text comes in pieces.

use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::LlmError;
use super::builder::Commands;
use super::output::{Delta, RequestOutput};
use super::pending::{Pending, Taken};
use crate::core::{Command, Event};

/// A running request. Iterating waits for its news; the last item of each output has a finish
/// reason. Dropping it aborts the request.
pub struct ResponseStream {
    /// `None` once it has been taken for its output.
    pending: Option<Pending>,
    inbox: Receiver<(u64, Event)>,
    commands: Commands,
    request_id: u64,
}

/// What waiting for news led to.
#[derive(Debug)]
pub enum News {
    /// Something new.
    Delta(Delta),
    /// Nothing in the time given.
    Nothing,
    /// All outputs have ended.
    End,
}

impl ResponseStream {
    pub(super) fn new(pending: Pending, inbox: Receiver<(u64, Event)>, commands: Commands) -> Self {
        let request_id = pending.output.request_id;
        Self { pending: Some(pending), inbox, commands, request_id }
    }

    /// Number of the request, as [`super::Llm::abort`] takes it.
    pub fn request_id(&self) -> u64 {
        self.request_id
    }

    /// Ends the request; its outputs end with [`super::FinishReason::Cancelled`].
    pub fn abort(&self) {
        // An engine that is gone runs nothing.
        let _ = self.commands.send(Command::AbortRequest(self.request_id));
    }

    /// Waits for news, up to `limit`.
    ///
    /// # Errors
    /// What failed the request; nothing comes after it.
    pub fn next_within(&mut self, limit: Option<Duration>) -> Result<News, LlmError> {
        while let Some(pending) = self.pending.as_mut().filter(|p| !p.is_complete()) {
            let received = match limit {
                Some(limit) => self.inbox.recv_timeout(limit),
                None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            let (id, event) = match received {
                Ok(news) => news,
                Err(RecvTimeoutError::Timeout) => return Ok(News::Nothing),
                Err(RecvTimeoutError::Disconnected) => {
                    self.pending = None;
                    return Err(LlmError::Stopped);
                }
            };
            let Taken { delta, abort } = pending.take(id, event);
            if abort {
                let _ = self.commands.send(Command::Abort(id));
            }
            if let Some(error) = pending.failed.take() {
                self.pending = None;
                self.abort();
                return Err(error);
            }
            if let Some(delta) = delta {
                return Ok(News::Delta(delta));
            }
        }
        Ok(News::End)
    }

    /// Waits for the end and returns the whole answer, whatever of it was read before.
    ///
    /// # Errors
    /// What failed the request.
    pub fn finish(mut self) -> Result<RequestOutput, LlmError> {
        while let News::Delta(_) = self.next_within(None)? {}
        self.pending.take().map_or(Err(LlmError::Stopped), Pending::into_output)
    }
}

impl Iterator for ResponseStream {
    type Item = Result<Delta, LlmError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.next_within(None) {
            Ok(News::Delta(delta)) => Some(Ok(delta)),
            Ok(News::Nothing | News::End) => None,
            Err(error) => Some(Err(error)),
        }
    }
}

impl Drop for ResponseStream {
    fn drop(&mut self) {
        if self.pending.as_ref().is_some_and(|pending| !pending.is_complete()) {
            self.abort();
        }
    }
}
