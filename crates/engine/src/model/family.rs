//! Checks the `model_type` of a `config.json` before the rest of it is parsed. Unsupported models have other
//! fields, so that parsing them first would report a missing field instead of the unsupported model.

use std::path::Path;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::checkpoint::json_file::parse_json;
use super::{Architecture, ModelError};

#[derive(Deserialize)]
struct Family {
    model_type: String,
    text_config: Option<IgnoredAny>,
    vision_config: Option<IgnoredAny>,
    audio_config: Option<IgnoredAny>,
}

/// Refuses a model that the engine does not run, by its `model_type`.
///
/// # Errors
/// [`ModelError::Unsupported`]; [`ModelError::Json`] for a text without a `model_type`.
pub(super) fn check(path: &Path, text: &[u8]) -> Result<(), ModelError> {
    let family: Family = parse_json(path, text)?;
    match Architecture::from_name(&family.model_type) {
        Err(ModelError::Unsupported { field, found, allowed }) => {
            let found = format!("{found}{}", family.modality());
            Err(ModelError::Unsupported { field, found, allowed })
        }
        other => other.map(|_| ()),
    }
}

impl Family {
    /// Inputs of the model other than text, as an addition to the error.
    const fn modality(&self) -> &'static str {
        match self {
            Self { vision_config: Some(_), .. } => ", a vision-language model, which takes images",
            Self { audio_config: Some(_), .. } => ", a model of audio and text",
            Self { text_config: Some(_), .. } => ", a multimodal model with a text model inside",
            _ => "",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsupported_models_are_named_before_missing_fields() {
        for (json, words) in [
            (r#"{"model_type": "qwen3_vl", "vision_config": {}}"#, ["qwen3_vl", "images"]),
            (r#"{"model_type": "qwen2_audio", "audio_config": {}}"#, ["qwen2_audio", "audio"]),
            (r#"{"model_type": "gemma3n", "text_config": {}}"#, ["gemma3n", "multimodal"]),
            (r#"{"model_type": "gpt2"}"#, ["gpt2", "allowed: llama"]),
        ] {
            let error = check(Path::new("config.json"), json.as_bytes()).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        assert!(check(Path::new("config.json"), b"{}").is_err());
        assert!(check(Path::new("config.json"), br#"{"model_type": "llama"}"#).is_ok());
    }
}
