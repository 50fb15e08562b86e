//! Reading the JSON files of a model folder.

use std::path::Path;

use lora_core::files;

use crate::model::ModelError;

/// Reads a file of bounded size.
pub(in crate::model) fn read_file(path: &Path) -> Result<Vec<u8>, ModelError> {
    files::read(path, files::MAX_CONFIG).map_err(|e| ModelError::io(path, e))
}

/// As [`read_file`]; `None` if the file does not exist.
pub(in crate::model) fn read_optional_file(path: &Path) -> Result<Option<Vec<u8>>, ModelError> {
    files::read_optional(path, files::MAX_CONFIG).map_err(|e| ModelError::io(path, e))
}

/// Parses a file's text. Errors name the file, and the field with its place.
pub(in crate::model) fn parse_json<T: serde::de::DeserializeOwned>(
    path: &Path,
    text: &[u8],
) -> Result<T, ModelError> {
    let mut json = serde_json::Deserializer::from_slice(text);
    serde_path_to_error::deserialize(&mut json)
        .map_err(|e| ModelError::Json { path: path.to_owned(), cause: e.to_string() })
}
