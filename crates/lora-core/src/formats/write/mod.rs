//! Writers of adapter files: the same change of the model in another container or layout.
//!
//! A writer holds at most one rearranged tensor in memory besides the adapter: where elements go is
//! described first, and the bytes are made when their turn in the file comes.

use std::path::{Path, PathBuf};

mod check;
mod config;
mod contents;
mod experts;
mod fuse;
mod names;
#[cfg(feature = "nemo")]
mod nemo;
mod peft;
mod stack;

#[cfg(feature = "nemo")]
pub use nemo::nemo;
pub use peft::peft;

/// Why an adapter could not be written; nothing is left behind then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// Something is there already, and is left as it is.
    #[error("{}: exists already; name a path where nothing is yet", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// The operating system refused to write a file.
    #[error("{}: cannot be written: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The adapter has something that the target cannot say.
    #[error("{subject}: found {found}, allowed is {allowed}; {remedy}")]
    Inexpressible {
        /// The sites, or the setting.
        subject: String,
        /// What the adapter has.
        found: String,
        /// What the target can hold.
        allowed: String,
        /// What to do about it.
        remedy: String,
    },
}

/// An adapter that the target cannot hold.
fn inexpressible(
    subject: &(impl ToString + ?Sized),
    found: impl Into<String>,
    allowed: impl Into<String>,
    remedy: impl Into<String>,
) -> WriteError {
    WriteError::Inexpressible {
        subject: subject.to_string(),
        found: found.into(),
        allowed: allowed.into(),
        remedy: remedy.into(),
    }
}

fn io_error(path: &Path, source: std::io::Error) -> WriteError {
    WriteError::Io { path: path.to_owned(), source }
}
