//! Torch's zip files (`.bin`, `.pth`, `.pt`, `.ckpt`): a pickle that describes the tensors, and an entry
//! with the elements of each storage.
//!
//! A pickle is a program. [`parse`] scans all of it before running any of it, and refuses it if it names
//! any global but the functions by which torch rebuilds tensors. It is then run by candle's pickle
//! machine, which only creates data: nothing is ever imported or called.

use crate::formats::recognise::refuse_others;
use crate::formats::{AdapterError, FileKind, RawTensors, Source};

mod archive;
mod guard;
mod names;
mod opcodes;
mod tensors;
mod unpickle;

#[cfg(test)]
mod tests;

use archive::Archive;

/// The state dict of a torch file, a flat dict from names to tensors. Only the directory and the pickle are
/// read; tensors are byte ranges of `file`.
///
/// # Errors
/// [`AdapterError::InvalidTorch`] if the file is something else, [`AdapterError::ForbiddenGlobal`] if its
/// pickle names another global, and errors of the file system.
pub fn parse(file: &Source) -> Result<RawTensors, AdapterError> {
    // These kinds are accepted here because `Archive::open` has better errors for them.
    refuse_others(file, &[FileKind::Zip, FileKind::Pickle, FileKind::Archive])?;
    let mut archive = Archive::open(file)?;
    let program = archive.pickle()?.bytes()?;
    let state = unpickle::unpickle(&program).map_err(|problem| problem.of(file))?;
    let tensors = tensors::collect(&state, &mut archive)?;
    Ok(RawTensors { tensors, files: vec![file.path().to_owned()] })
}

/// Why a file or its pickle is refused.
#[derive(PartialEq, Debug)]
enum Problem {
    /// It is not a state dict as torch writes it.
    Invalid(String),
    /// It names a global that does not build tensors.
    Forbidden(String),
}

impl Problem {
    fn of(self, file: &Source) -> AdapterError {
        let path = file.path().to_owned();
        match self {
            Self::Invalid(problem) => AdapterError::InvalidTorch { path, problem },
            Self::Forbidden(global) => AdapterError::ForbiddenGlobal { path, global },
        }
    }
}

fn invalid(file: &Source, problem: impl Into<String>) -> AdapterError {
    Problem::Invalid(problem.into()).of(file)
}
