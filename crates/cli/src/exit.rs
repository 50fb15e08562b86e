//! How a run ends.

use std::io;
use std::process::ExitCode;

use lora_core::formats::AdapterError;
use lora_core::formats::write::WriteError;
use loramux_engine::adapters::RegistryError;
use loramux_engine::model::ModelError;
use loramux_engine::{ErrorKind, LlmError};

/// The exit codes of `loramux`, as its help and the README list them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    /// All went well.
    Fine = 0,
    /// What was asked about is refused or failed: an adapter would not be served or cannot be
    /// converted, two adapters differ, or at least one request has no answer.
    Refused = 1,
    /// The command line is wrong, or names a file that cannot be read or written.
    Usage = 2,
    /// The model cannot be had or loaded.
    Model = 3,
    /// SIGINT ended a batch; what was done is written.
    Interrupted = 130,
    /// Nobody reads the answers any more.
    ClosedPipe = 141,
    /// SIGTERM ended a batch; what was done is written.
    Terminated = 143,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl Exit {
    /// The exit code of an error, the same in every command: that of the outermost cause that has one.
    pub fn of(error: &anyhow::Error) -> Self {
        error.chain().find_map(of_cause).unwrap_or(Self::Refused)
    }

    /// The exit code of an adapter that cannot be used: files that cannot be read are the command
    /// line's fault, what is in them is the adapter's, and weights to compare it with are the model's.
    pub fn of_adapter(error: &AdapterError) -> Self {
        match error {
            AdapterError::Base { .. } => Self::Model,
            error if error.is_not_found() => Self::Usage,
            _ => Self::Refused,
        }
    }
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(error) = cause.downcast_ref::<io::Error>() {
        return Some(match error.kind() {
            io::ErrorKind::BrokenPipe => Exit::ClosedPipe,
            _ => Exit::Usage,
        });
    }
    if let Some(error) = cause.downcast_ref::<AdapterError>() {
        return Some(Exit::of_adapter(error));
    }
    if let Some(error) = cause.downcast_ref::<WriteError>() {
        return Some(match error {
            WriteError::Exists { .. } | WriteError::Io { .. } => Exit::Usage,
            _ => Exit::Refused,
        });
    }
    if cause.is::<ModelError>() {
        return Some(Exit::Model);
    }
    cause.downcast_ref().map(of_engine)
}

/// The exit code of an engine that does not start.
fn of_engine(error: &LlmError) -> Exit {
    if let LlmError::Adapter(error) = error
        && let RegistryError::Load { cause, .. } = &**error
    {
        return Exit::of_adapter(cause);
    }
    match error.kind() {
        ErrorKind::Setting | ErrorKind::Request => Exit::Usage,
        ErrorKind::AdapterNotFound | ErrorKind::AdapterRefused => Exit::Refused,
        _ => Exit::Model,
    }
}

/// An error that ends a run.
#[derive(Debug)]
pub struct Failure {
    /// With which exit code.
    pub exit: Exit,
    /// What went wrong.
    pub error: anyhow::Error,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        Self { exit: Exit::of(&error), error }
    }
}

/// Gives an error another exit code than [`Exit::of`] does.
pub(crate) trait OrExit<T> {
    /// The value, or the error with this code.
    fn or_exit(self, exit: Exit) -> Result<T, Failure>;
}

impl<T, E: Into<anyhow::Error>> OrExit<T> for Result<T, E> {
    fn or_exit(self, exit: Exit) -> Result<T, Failure> {
        self.map_err(|error| Failure { exit, error: error.into() })
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    fn exit(error: impl Into<anyhow::Error>) -> Exit {
        Failure::from(Err::<(), _>(error.into()).context("what was done").unwrap_err()).exit
    }

    #[test]
    fn the_same_fault_has_the_same_code_wherever_it_is_met() {
        let absent = || AdapterError::Missing { path: "p".into(), what: "this file".to_owned() };
        let damaged = || AdapterError::InvalidSafetensors { path: "p".into(), problem: "x".into() };
        let load = |cause| LlmError::from(RegistryError::Load { name: "a".to_owned(), cause });
        assert_eq!((exit(absent()), exit(load(absent()))), (Exit::Usage, Exit::Usage));
        assert_eq!((exit(damaged()), exit(load(damaged()))), (Exit::Refused, Exit::Refused));
        assert_eq!(exit(io::Error::from(io::ErrorKind::BrokenPipe)), Exit::ClosedPipe);
        assert_eq!(exit(io::Error::from(io::ErrorKind::StorageFull)), Exit::Usage);
        assert_eq!(exit(LlmError::Stopped), Exit::Model);
        assert_eq!(exit(anyhow::anyhow!("something else")), Exit::Refused);
    }
}
