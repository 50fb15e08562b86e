//! Exit codes, and the mapping from errors to them.

use std::io;
use std::process::ExitCode;

use lora_core::formats::AdapterError;
use lora_core::formats::write::WriteError;
use loramux_engine::adapters::RegistryError;
use loramux_engine::model::ModelError;
use loramux_engine::{ErrorKind, LlmError};

/// The exit codes of `loramux`, as `--help` and `docs/command-line.md` list them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    /// Success.
    Fine = 0,
    /// An adapter would be refused or cannot be converted, two adapters differ, or at least one request failed.
    Refused = 1,
    /// The command line is wrong, or names a file that cannot be read or written.
    Usage = 2,
    /// The model cannot be downloaded or loaded.
    Model = 3,
    /// SIGINT ended a batch; finished answers are written.
    Interrupted = 130,
    /// The reader of the output closed it.
    ClosedPipe = 141,
    /// SIGTERM ended a batch; finished answers are written.
    Terminated = 143,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl Exit {
    /// The exit code of an error, the same in every command: that of the outermost cause that determines one.
    pub fn of(error: &anyhow::Error) -> Self {
        error.chain().find_map(of_cause).unwrap_or(Self::Refused)
    }

    /// The exit code for an adapter that cannot be used: [`Exit::Usage`] if its files are not found, [`Exit::Model`] if
    /// the base weights to compare it with cannot be read, else [`Exit::Refused`].
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

/// The exit code for an error of the engine.
fn of_engine(error: &LlmError) -> Exit {
    if let LlmError::Adapter(error) = error {
        return match &**error {
            RegistryError::Load { cause, .. } => Exit::of_adapter(cause),
            _ => Exit::Refused,
        };
    }
    match error.kind() {
        ErrorKind::Setting | ErrorKind::Request => Exit::Usage,
        _ => Exit::Model,
    }
}

/// An error that ends a run.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// The error to show.
    pub error: anyhow::Error,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        Self { exit: Exit::of(&error), error }
    }
}

/// Overrides the exit code that [`Exit::of`] would choose.
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
    fn an_error_has_the_same_code_in_every_command() {
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
