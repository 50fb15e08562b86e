//! How a run ends.

use std::process::ExitCode;

/// The exit codes of `polylora`.
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
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
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

/// What is not said to be something else has failed while it ran.
impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { exit: Exit::Refused, error: error.into() }
    }
}

/// Gives an error its exit code.
pub(crate) trait OrExit<T> {
    /// The value, or the error with this code.
    fn or_exit(self, exit: Exit) -> Result<T, Failure>;
}

impl<T, E: Into<anyhow::Error>> OrExit<T> for Result<T, E> {
    fn or_exit(self, exit: Exit) -> Result<T, Failure> {
        self.map_err(|error| Failure { exit, error: error.into() })
    }
}
