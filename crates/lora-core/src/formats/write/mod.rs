//! Writers of adapter files, which convert an adapter to another container or layout.
//!
//! Besides the adapter, a writer holds at most one rearranged tensor in memory: tensors are described
//! first, and each is built when it is written.

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

/// Why an adapter could not be written. No files are left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The path exists already; it is not changed.
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
    /// The target format cannot represent the adapter.
    #[error("{subject}: found {found}, allowed is {allowed}; {remedy}")]
    Inexpressible {
        /// The sites, or the setting.
        subject: String,
        /// The value that the adapter has.
        found: String,
        /// The values that the target can represent.
        allowed: String,
        /// The remedy.
        remedy: String,
    },
}

/// A [`WriteError::Inexpressible`].
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
