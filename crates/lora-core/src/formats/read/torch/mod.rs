//! Torch's zip files (`.bin`, `.pth`, `.pt`, `.ckpt`): a pickle that says which tensors there are,
//! and an entry of plain numbers for each storage.
//!
//! A pickle is a program. [`parse`] looks through all of it before any of it is run, and refuses one
//! that names anything but torch's builders of tensors. What is then run is candle's pickle machine,
//! which only makes data: no name is ever resolved or called.

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

/// The state dict of a torch file: a flat dict from names to tensors. Only its directory and its
/// pickle are read; the tensors are ranges of `file`.
///
/// # Errors
/// [`AdapterError::InvalidTorch`] for what is no such file, [`AdapterError::ForbiddenGlobal`] for a
/// pickle that asks for more than tensors, and those of the file system.
pub fn parse(file: &Source) -> Result<RawTensors, AdapterError> {
    // What is no zip file at all, the archive says in torch's own terms.
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
    /// It is not what torch writes for a state dict.
    Invalid(String),
    /// It names something that is no builder of tensors.
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
