//! What a backend's ops can fail with.

use thiserror::Error;

use super::{DType, Pool};

/// A misused op, or a device that failed.
///
/// Ops check shapes and dtypes before they start work, so an error other than
/// [`Error::Device`] leaves every output as it was.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// Two operands, or an operand and an op, disagree about an extent.
    #[error("{op}: {what} is {found}, but must be {expected}")]
    Shape {
        /// The op that was called.
        op: &'static str,
        /// The extent that is wrong.
        what: &'static str,
        /// Its value.
        found: usize,
        /// The value that the other operands ask for.
        expected: usize,
    },
    /// An operand has an element type that the op does not take.
    #[error("{op}: {what} has dtype {found}; allowed: {allowed}")]
    DType {
        /// The op that was called.
        op: &'static str,
        /// The operand.
        what: &'static str,
        /// Its dtype.
        found: DType,
        /// The dtypes that the op takes.
        allowed: &'static str,
    },
    /// An index points outside its table.
    #[error("{op}: {what} {found} is outside 0..{limit}")]
    OutOfRange {
        /// The op that was called.
        op: &'static str,
        /// What the index counts.
        what: &'static str,
        /// The index.
        found: i64,
        /// The number of entries.
        limit: usize,
    },
    /// A pool of device memory is exhausted.
    #[error("{pool:?} pool: {requested} bytes asked for; {}", free_bytes(*available))]
    OutOfMemory {
        /// The pool.
        pool: Pool,
        /// Bytes asked for.
        requested: usize,
        /// Bytes left, where they are known.
        available: Option<usize>,
    },
    /// The backend does not implement what was asked for.
    #[error("{op}: the {backend} backend does not support {what}")]
    Unsupported {
        /// The op that was called.
        op: &'static str,
        /// The backend's name.
        backend: &'static str,
        /// What is missing.
        what: String,
    },
    /// The device or its driver failed; the backend must not be used any more.
    #[error("device failure: {0}")]
    Device(String),
    /// A device that holds another part of the same model failed, and said why by itself.
    #[error("another device of the group failed")]
    Peer,
}

/// How much memory is free, for a message.
pub fn free_bytes(available: Option<usize>) -> String {
    match available {
        Some(bytes) => format!("{bytes} are free"),
        None => "fewer are free".to_owned(),
    }
}

/// Result of a backend's op.
pub type Result<T> = std::result::Result<T, Error>;

/// Checks one extent of an op's operand.
///
/// # Errors
/// [`Error::Shape`] if `found != expected`.
pub fn check_extent(
    op: &'static str,
    what: &'static str,
    found: usize,
    expected: usize,
) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Shape { op, what, found, expected }) }
}
