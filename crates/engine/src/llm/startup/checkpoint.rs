//! Opening a model: its configuration, its tokenizer, and its source of weights.

use std::path::Path;

use lora_core::files;

use super::base_model::{BaseModel, open_gguf};
use super::settings::LoadFormat;
use crate::llm::LlmError;
use crate::llm::text::TextModel;
use crate::model::{DummySource, FolderSource, WeightSource};

/// An opened model whose weights have not been read.
pub(in crate::llm) struct Checkpoint {
    pub base: BaseModel,
    pub text: TextModel,
    pub source: Box<dyn WeightSource + Send>,
}

impl Checkpoint {
    /// Opens the folder or `.gguf` file at `path`. `tokenizer` replaces the model's own tokenizer.
    ///
    /// # Errors
    /// [`LlmError`] naming what is missing or broken.
    pub fn open(
        path: &Path,
        tokenizer: Option<&Path>,
        format: LoadFormat,
    ) -> Result<Self, LlmError> {
        if path.is_dir() {
            return Self::open_folder(path, tokenizer, format);
        }
        let gguf = open_gguf(path)?;
        if format == LoadFormat::Dummy {
            return Err(LlmError::Setting {
                setting: "load_format",
                found: "dummy".to_owned(),
                allowed: "auto for a .gguf file; dummy takes a folder with config.json".to_owned(),
            });
        }
        let text = match tokenizer {
            Some(dir) => TextModel::from_dir(dir, gguf.config())?,
            None => TextModel::from_gguf(path, &gguf)?,
        };
        Ok(Self { base: BaseModel::of_gguf(&gguf), text, source: Box::new(gguf) })
    }

    fn open_folder(
        path: &Path,
        tokenizer: Option<&Path>,
        format: LoadFormat,
    ) -> Result<Self, LlmError> {
        let mut base = BaseModel::of_folder(path)?;
        if let Some(weights) = &mut base.quantization.weights {
            weights.stored = format == LoadFormat::Auto;
        }
        let source = open_weights(path, format)?;
        let dir = tokenizer.unwrap_or(path);
        let only_shape = format == LoadFormat::Dummy && tokenizer.is_none();
        let text = if only_shape && !files::is_present(&dir.join("tokenizer.json")) {
            TextModel::none(dir, &base.config)
        } else {
            TextModel::from_dir(dir, &base.config)?
        };
        Ok(Self { base, text, source })
    }
}

/// Opens the weights of the folder or `.gguf` file at `path`.
///
/// # Errors
/// [`LlmError`] naming what is missing or broken.
pub(in crate::llm) fn open_weights(
    path: &Path,
    format: LoadFormat,
) -> Result<Box<dyn WeightSource + Send>, LlmError> {
    Ok(match format {
        LoadFormat::Dummy => Box::new(DummySource::default()),
        LoadFormat::Auto if path.is_dir() => Box::new(FolderSource::open(path)?),
        LoadFormat::Auto => Box::new(open_gguf(path)?),
    })
}
