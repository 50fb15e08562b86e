//! Stands in for the reader of NeMo archives without the feature `nemo`.

use std::path::Path;

use crate::adapter::Adapter;
use crate::formats::{AdapterError, ReadOptions, Source};

/// Says that NeMo archives are not read.
///
/// # Errors
/// Always [`AdapterError::NotCompiledIn`].
pub fn read(path: &Path, _: &ReadOptions) -> Result<Adapter, AdapterError> {
    Err(AdapterError::NotCompiledIn {
        path: path.to_owned(),
        container: "NeMo archive",
        feature: "nemo",
    })
}

/// Says that NeMo archives are not read.
///
/// # Errors
/// Always [`AdapterError::NotCompiledIn`].
pub fn read_archive(archive: &Source, options: &ReadOptions) -> Result<Adapter, AdapterError> {
    read(archive.path(), options)
}

/// Says that NeMo archives are not read.
///
/// # Errors
/// Always [`AdapterError::NotCompiledIn`].
pub fn probe(path: &Path) -> Result<(), AdapterError> {
    read(path, &ReadOptions::default()).map(drop)
}
