//! Why a model cannot be loaded.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use lora_core::{Code, Rejection};
use thiserror::Error;

/// A checkpoint that is missing, damaged or not supported.
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
    /// A JSON file is malformed, or a field has the wrong type.
    #[error("{path}: {cause}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The error with field, line and column.
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
    /// A setting has a value that the engine does not support.
    #[error("{field} is {found}; allowed: {allowed}")]
    Unsupported {
        /// The field.
        field: String,
        /// Its value.
        found: String,
        /// Values that are supported.
        allowed: String,
    },
    /// Two fields of a `config.json` give different values for one setting.
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
    /// The weights are quantised in a format that the engine does not support.
    #[error("{path}: has weights in {format}; allowed: {UNQUANTIZED}; {UNQUANTIZED_REMEDY}")]
    Quantized {
        /// The file with the quantisation settings, or the folder.
        path: PathBuf,
        /// The method, with its settings.
        format: String,
    },
    /// The checkpoint lacks a tensor.
    #[error("{path}: tensor {name} is missing")]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor does not have the shape that follows from the config.
    #[error("tensor {name} has shape {found:?}, but the config asks for {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The expected shape.
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
    /// The device reported an error.
    #[error(transparent)]
    Device(#[from] lora_core::Error),
}

const UNQUANTIZED: &str = "weights in 16 bits, or in FP8 with a scale for each tensor, as ModelOpt \
                           writes them";
const UNQUANTIZED_REMEDY: &str = "take the 16-bit checkpoint that it was made of, also for adapters \
                                  trained on quantised weights (QLoRA); quant_algo FP8 \
                                  (--quant-algo FP8) quantises it while it is loaded";

impl ModelError {
    /// For a model that can be read but is not supported: the rule that it breaks. `None` for a model that
    /// cannot be read, or whose weights are damaged.
    pub fn rejection(&self) -> Option<Rejection> {
        let code = Code::UnsupportedModel;
        match self {
            Self::Unsupported { field, found, allowed } => {
                let remedy = "serve the adapter on a model that is run";
                Some(Rejection::new(code, field, found, allowed, remedy))
            }
            Self::Quantized { format, .. } => {
                let (setting, found) = ("quantization_config", format!("weights in {format}"));
                Some(Rejection::new(code, setting, found, UNQUANTIZED, UNQUANTIZED_REMEDY))
            }
            _ => None,
        }
    }

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
