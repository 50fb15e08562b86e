//! The dimensions of a model on disk.

use std::path::Path;

use anyhow::Context;
use lora_core::ModelGeometry;
use loramux_engine::model::ModelError;
use loramux_engine::{BaseModel, geometry};

use crate::exit::{Exit, Failure, OrExit};

/// Reads the dimensions of a model, a folder or a .gguf file, from its configuration alone.
///
/// # Errors
/// [`Exit::Model`] if the configuration cannot be read or is of no model that is served.
pub(crate) fn read(path: &Path) -> Result<ModelGeometry, Failure> {
    Ok(geometry(&or_fail(path, BaseModel::read(path))?.config))
}

/// Ends the run if the model at `path` could not be read.
///
/// # Errors
/// As [`read`].
pub(crate) fn or_fail(
    path: &Path,
    model: Result<BaseModel, ModelError>,
) -> Result<BaseModel, Failure> {
    model.with_context(|| format!("cannot read the model {}", path.display())).or_exit(Exit::Model)
}
