//! Errors of a backend.

use thiserror::Error;

use super::{DType, Pool};

/// A wrong call of an op, or a failure of the device.
///
/// Ops check shapes and dtypes before they start work, so after an error other than [`Error::Device`] and
/// [`Error::Peer`] all outputs are unchanged.
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
        /// The value that the other operands require.
        expected: usize,
    },
    /// An extent is not a multiple of another.
    #[error("{op}: {found} {what} cannot be divided by {divisor} {by}")]
    Indivisible {
        /// The op that was called.
        op: &'static str,
        /// The extent that must be a multiple.
        what: &'static str,
        /// Its value.
        found: usize,
        /// The other extent.
        by: &'static str,
        /// Its value.
        divisor: usize,
    },
    /// An operand has a dtype that the op does not support.
    #[error("{op}: {what} has dtype {found}; allowed: {allowed}")]
    DType {
        /// The op that was called.
        op: &'static str,
        /// The operand.
        what: &'static str,
        /// Its dtype.
        found: DType,
        /// The supported dtypes.
        allowed: &'static str,
    },
    /// An index is out of range.
    #[error("{op}: {what} {found} is outside 0..{limit}")]
    OutOfRange {
        /// The op that was called.
        op: &'static str,
        /// The kind of index.
        what: &'static str,
        /// The index.
        found: i64,
        /// The number of entries.
        limit: usize,
    },
    /// Device memory is exhausted.
    #[error("{pool:?} pool: {requested} bytes asked for; {}", free_bytes(*available))]
    OutOfMemory {
        /// The pool.
        pool: Pool,
        /// Bytes asked for.
        requested: usize,
        /// Free bytes, if known.
        available: Option<usize>,
    },
    /// The backend does not support the call.
    #[error("{op}: the {backend} backend does not support {what}")]
    Unsupported {
        /// The op that was called.
        op: &'static str,
        /// The backend's name.
        backend: &'static str,
        /// The unsupported feature.
        what: String,
    },
    /// The device or its driver failed. The backend must not be used any more.
    #[error("device failure: {0}")]
    Device(String),
    /// Another rank of the group failed; it reports the reason itself.
    #[error("another device of the group failed")]
    Peer,
}

/// The amount of free memory, for a message.
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
