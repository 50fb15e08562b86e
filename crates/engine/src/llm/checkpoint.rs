//! Opening a model: its config, its text side, and where its weights come from.

use std::path::Path;

use super::LlmError;
use super::settings::LoadFormat;
use super::text_model::TextModel;
use crate::model::{
    DummySource, FolderSource, Gguf, ModelConfig, ModelError, Quantization, WeightSource,
};

/// An opened model, its weights unread.
pub(super) struct Checkpoint {
    pub config: ModelConfig,
    pub text: TextModel,
    pub source: Box<dyn WeightSource + Send>,
    pub quantization: Quantization,
}

impl Checkpoint {
    /// Opens the folder or `.gguf` file at `path`; `tokenizer` takes the place of its own.
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
        if !is_gguf(path) {
            let what = if path.exists() { "not a folder or .gguf file" } else { "does not exist" };
            let (path, what) = (path.to_owned(), what.to_owned());
            return Err(ModelError::NotAModel { path, what }.into());
        }
        if format == LoadFormat::Dummy {
            return Err(LlmError::Setting {
                setting: "load_format",
                found: "dummy".to_owned(),
                allowed: "auto for a .gguf file; dummy takes a folder with config.json".to_owned(),
            });
        }
        let gguf = Gguf::open(path)?;
        let text = match tokenizer {
            Some(dir) => TextModel::from_dir(dir)?,
            None => TextModel::from_gguf(path, &gguf)?,
        };
        let (config, quantization) = (gguf.config().clone(), Quantization::default());
        Ok(Self { config, text, source: Box::new(gguf), quantization })
    }

    fn open_folder(
        path: &Path,
        tokenizer: Option<&Path>,
        format: LoadFormat,
    ) -> Result<Self, LlmError> {
        let source: Box<dyn WeightSource + Send> = match format {
            LoadFormat::Auto => Box::new(FolderSource::open(path)?),
            LoadFormat::Dummy => Box::new(DummySource::default()),
        };
        let config = ModelConfig::from_dir(path)?;
        let mut quantization = Quantization::from_dir(path)?;
        if let Some(weights) = &mut quantization.weights {
            weights.stored = format == LoadFormat::Auto;
        }
        let dir = tokenizer.unwrap_or(path);
        let only_shape = format == LoadFormat::Dummy && tokenizer.is_none();
        let text = match only_shape && !dir.join("tokenizer.json").exists() {
            true => TextModel::none(dir),
            false => TextModel::from_dir(dir)?,
        };
        Ok(Self { config, text, source, quantization })
    }
}

fn is_gguf(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}
