//! Reading the dimensions of a model on disk.

use std::path::Path;

use anyhow::Context;
use lora_core::ModelGeometry;
use loramux_engine::model::ModelError;
use loramux_engine::{BaseModel, geometry};

use crate::exit::{Exit, Failure, OrExit};

/// Reads the dimensions of a model, a folder or a `.gguf` file, without loading its weights.
///
/// # Errors
/// [`Exit::Model`] if the configuration cannot be read, or the model is not supported.
pub(crate) fn read(path: &Path) -> Result<ModelGeometry, Failure> {
    Ok(geometry(&or_fail(path, BaseModel::read(path))?.config))
}

/// Turns an error of reading the model at `path` into a failure that names it.
///
/// # Errors
/// As [`read`].
pub(crate) fn or_fail(
    path: &Path,
    model: Result<BaseModel, ModelError>,
) -> Result<BaseModel, Failure> {
    model.with_context(|| format!("cannot read the model {}", path.display())).or_exit(Exit::Model)
}
