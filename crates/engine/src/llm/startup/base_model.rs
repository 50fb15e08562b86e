//! Reading a base model's configuration, which decides whether the model is supported, without its weights.

use std::path::Path;

use lora_core::files;
use lora_core::formats::{self, FileKind, Found};
use serde_json::Value;

use crate::model::{Gguf, ModelConfig, ModelError, Quantization};

const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Configuration of a base model. [`Llm`](crate::Llm) reads this first, so it tells without reading weights
/// whether a model is supported.
#[derive(Clone, Debug)]
pub struct BaseModel {
    /// Shape and hyperparameters.
    pub config: ModelConfig,
    /// Quantisation of weights and KV cache.
    pub quantization: Quantization,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

impl BaseModel {
    /// Reads the configuration of a model: a folder, or a `.gguf` file.
    ///
    /// # Errors
    /// [`ModelError`]. With a [`ModelError::rejection`], the model can be read but is not supported.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        if path.is_dir() { Self::of_folder(path) } else { Ok(Self::of_gguf(&open_gguf(path)?)) }
    }

    /// Reads `config.json` and the other configuration files of a folder.
    ///
    /// # Errors
    /// As [`BaseModel::read`].
    pub(in crate::llm) fn of_folder(dir: &Path) -> Result<Self, ModelError> {
        if !dir.join("config.json").exists()
            && let Some(what) = folder_in_its_place(dir)
        {
            return Err(ModelError::NotAModel { path: dir.to_owned(), what });
        }
        Ok(Self {
            config: ModelConfig::from_dir(dir)?,
            quantization: Quantization::from_dir(dir)?,
            warnings: adapter_beside(dir).into_iter().collect(),
        })
    }

    /// The configuration of an open GGUF file. Its weights are dequantised on loading.
    pub(in crate::llm) fn of_gguf(gguf: &Gguf) -> Self {
        let (config, quantization) = (gguf.config().clone(), Quantization::default());
        Self { config, quantization, warnings: Vec::new() }
    }
}

/// Opens a `.gguf` file that was given as the model.
///
/// # Errors
/// [`ModelError`]; [`ModelError::NotAModel`] with the kind of the file, if it is no GGUF file.
pub(in crate::llm) fn open_gguf(path: &Path) -> Result<Gguf, ModelError> {
    let named = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let what = match formats::recognise(path) {
        Some((_, Found::File(FileKind::Gguf))) if named => None,
        Some((_, Found::File(FileKind::Gguf))) => {
            Some("is a GGUF file without the extension .gguf".to_owned())
        }
        Some((_, found)) => Some(found.what()),
        None if !path.exists() => Some("does not exist".to_owned()),
        None if !named || !path.is_file() => Some("not a folder or .gguf file".to_owned()),
        None => None,
    };
    match what {
        Some(what) => Err(ModelError::NotAModel { path: path.to_owned(), what }),
        None => Gguf::open(path),
    }
}

/// Describes a folder without `config.json`, if it is recognised as something else.
fn folder_in_its_place(dir: &Path) -> Option<String> {
    let config = dir.join(ADAPTER_CONFIG);
    if config.is_file() {
        let base = base_of(&config).unwrap_or_else(|| "its base model".to_owned());
        return Some(format!(
            "holds an adapter ({ADAPTER_CONFIG}) and no model; give {base} as the model, and this \
             folder as an adapter"
        ));
    }
    match formats::recognise(dir)?.1 {
        // The texts of these are about adapters, and would mislead here.
        Found::Model | Found::OtherName { .. } | Found::AdaptersBelow { .. } | Found::Empty => None,
        found => Some(found.to_string()),
    }
}

/// The base model that an adapter's configuration names.
fn base_of(config: &Path) -> Option<String> {
    let config: Value =
        serde_json::from_slice(&files::read(config, files::MAX_CONFIG).ok()?).ok()?;
    let name = config.get("base_model_name_or_path")?.as_str()?.trim();
    (!name.is_empty()).then(|| format!("{name:?}, its base model,"))
}

/// Warns of an adapter in the model's folder: transformers would apply it, this engine does not.
fn adapter_beside(dir: &Path) -> Option<String> {
    dir.join(ADAPTER_CONFIG).is_file().then(|| {
        format!(
            "{}: the model's folder also holds an adapter ({ADAPTER_CONFIG}), which is not applied \
             to the base model; give the folder as an adapter to serve it",
            dir.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(path: &Path) -> String {
        BaseModel::read(path).unwrap_err().to_string()
    }

    #[test]
    fn an_adapter_in_the_folder_of_a_model_is_a_warning() {
        let dir = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176,
            "num_hidden_layers": 3, "num_attention_heads": 4, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 512,
        });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        assert!(BaseModel::read(dir.path()).unwrap().warnings.is_empty());
        std::fs::write(dir.path().join(ADAPTER_CONFIG), "{}").unwrap();
        let warnings = BaseModel::read(dir.path()).unwrap().warnings;
        assert!(matches!(&warnings[..], [one] if one.contains(ADAPTER_CONFIG)), "{warnings:?}");
        std::fs::write(dir.path().join("quantize_config.json"), "{}").unwrap();
        let error = BaseModel::read(dir.path()).unwrap_err();
        assert!(error.rejection().unwrap().found.contains("gptq"), "{error}");
    }

    #[test]
    fn other_files_given_as_a_model_are_recognised() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            path
        };
        make("adapter/adapter_config.json", r#"{"base_model_name_or_path": "org/base"}"#);
        make("run/checkpoint-20/config.json", "{}");
        make("cache/snapshots/abc/config.json", "{}");
        make("cache/refs/main", "abc");
        let pointer = make("model.gguf", "version https://git-lfs.github.com/spec/v1\n");
        let weights = make("w.safetensors", "\x10\0\0\0\0\0\0\0{}");
        let folder = |name: &str| dir.path().join(name);
        for (path, words) in [
            (folder("adapter"), &["holds an adapter", "\"org/base\", its base model"][..]),
            (folder("run"), &["checkpoint-20"]),
            (folder("cache"), &["snapshots/abc"]),
            (pointer, &["git-lfs"]),
            (weights, &["is a safetensors file", "give a folder"]),
            (folder("absent"), &["does not exist"]),
        ] {
            let error = refusal(&path);
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        std::fs::create_dir(folder("bare")).unwrap();
        assert!(refusal(&folder("bare")).contains("config.json"));
    }
}
