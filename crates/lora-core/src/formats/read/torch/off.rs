//! Stands in for the reader of torch files without the feature `torch`.

use crate::formats::{AdapterError, RawTensors, Source};

/// Fails, as torch files cannot be read.
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
