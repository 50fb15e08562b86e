//! The dimensions of a model on disk.

use std::path::Path;

use anyhow::Context;
use engine::geometry;
use engine::model::{Gguf, ModelConfig};
use lora_core::ModelGeometry;

use crate::exit::{Exit, Failure, OrExit};

/// Reads the dimensions of a model, a folder or a .gguf file, from its configuration alone.
///
/// # Errors
/// [`Exit::Model`] if the configuration cannot be read or is of no model that is served.
pub(crate) fn read(path: &Path) -> Result<ModelGeometry, Failure> {
    let config = match path.is_dir() {
        true => ModelConfig::from_dir(path),
        false => Gguf::open(path).map(|gguf| gguf.config().clone()),
    };
    let context = || format!("cannot read the model {}", path.display());
    Ok(geometry(&config.with_context(context).or_exit(Exit::Model)?))
}
