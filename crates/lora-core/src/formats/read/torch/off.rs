//! In place of the reader of torch files, where it is not compiled in.

use crate::formats::{AdapterError, RawTensors, Source};

/// Says that torch files are not read.
///
/// # Errors
/// Always [`AdapterError::NotCompiledIn`].
pub fn parse(file: &Source) -> Result<RawTensors, AdapterError> {
    Err(AdapterError::NotCompiledIn {
        path: file.path().to_owned(),
        container: "torch pickle",
        feature: "torch",
    })
}
