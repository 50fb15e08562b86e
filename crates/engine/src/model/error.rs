//! Why a model cannot be loaded.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A checkpoint that is missing, broken, or of a kind that the engine does not run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The path given is neither a model folder nor a GGUF file.
    #[error("{path}: {what}; give a folder with config.json and *.safetensors, or a .gguf file")]
    NotAModel {
        /// The path.
        path: PathBuf,
        /// What was found there.
        what: String,
    },
    /// A file cannot be read.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A JSON file is not what it should be.
    #[error("{path}: {cause}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Field, line and column.
        cause: String,
    },
    /// A weight file is truncated or not in its format.
    #[error("{path}: {cause}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// The weight files of a folder cannot be read.
    #[error(transparent)]
    Weights(#[from] lora_core::formats::AdapterError),
    /// A setting has a value that the engine does not run.
    #[error("{field} is {found}; allowed: {allowed}")]
    Unsupported {
        /// The field.
        field: String,
        /// Its value.
        found: String,
        /// What would be accepted.
        allowed: String,
    },
    /// Two fields of a `config.json` say different things about one setting.
    #[error(
        "config.json contradicts itself: {} is {}, but {} is {}; correct one of them, or remove it",
        fields[0], values[0], fields[1], values[1]
    )]
    Contradiction {
        /// The fields.
        fields: [String; 2],
        /// Their values.
        values: [String; 2],
    },
    /// The checkpoint lacks a tensor.
    #[error("{path}: tensor {name} is missing")]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor does not have the shape that the config asks for.
    #[error("tensor {name} has shape {found:?}, but the config asks for {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape asked for.
        expected: Vec<usize>,
    },
    /// A tensor holds NaN or infinities.
    #[error("tensor {name} holds values that are not finite; the checkpoint is damaged")]
    NonFinite {
        /// The tensor.
        name: String,
    },
    /// The checkpoint has tensors that the model would not use.
    #[error("{path}: {count} tensors belong to no part of a {architecture} model, first {first}")]
    LeftOver {
        /// The checkpoint.
        path: PathBuf,
        /// The architecture.
        architecture: &'static str,
        /// Number of such tensors.
        count: usize,
        /// Name of one.
        first: String,
    },
    /// The device refused.
    #[error(transparent)]
    Device(#[from] lora_core::Error),
}

impl ModelError {
    pub(crate) fn unsupported(
        field: impl Into<String>,
        found: impl Display,
        allowed: impl Into<String>,
    ) -> Self {
        Self::Unsupported { field: field.into(), found: found.to_string(), allowed: allowed.into() }
    }

    pub(crate) fn io(path: &Path, cause: io::Error) -> Self {
        Self::Io { path: path.to_owned(), cause }
    }
}
