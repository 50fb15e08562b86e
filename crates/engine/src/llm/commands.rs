//! Handles to the engine thread: sending commands, and joining it.

use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};

use super::LlmError;
use crate::core::Command;

/// Sends commands to the engine thread.
#[derive(Clone)]
pub(super) struct Commands(Sender<Command>);

impl From<Sender<Command>> for Commands {
    fn from(sender: Sender<Command>) -> Self {
        Self(sender)
    }
}

impl Commands {
    /// Sends a command that has no reply.
    ///
    /// # Errors
    /// [`LlmError::Stopped`].
    pub fn send(&self, command: Command) -> Result<(), LlmError> {
        self.0.send(command).map_err(|_| LlmError::Stopped)
    }

    /// Sends a command and waits for its reply.
    ///
    /// # Errors
    /// [`LlmError::Stopped`].
    pub fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, LlmError> {
        let (reply, answer) = bounded(1);
        self.send(command(reply))?;
        answer.recv().map_err(|_| LlmError::Stopped)
    }
}

/// The engine thread. Dropping it stops the engine and joins the thread.
pub(super) struct EngineThread {
    commands: Commands,
    /// `None` only during drop.
    thread: Option<JoinHandle<()>>,
}

impl EngineThread {
    /// Wraps a thread that serves the given commands.
    pub fn new(commands: Commands, thread: JoinHandle<()>) -> Self {
        Self { commands, thread: Some(thread) }
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        // Both fail only if the thread has ended already.
        let _ = self.commands.send(Command::Shutdown);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
