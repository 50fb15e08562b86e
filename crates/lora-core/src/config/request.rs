//! The adapter of a request.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::rules::{Code, Rejection};

/// Format of an adapter on disk.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CkptSource {
    /// A Hugging Face PEFT directory.
    #[default]
    Hf,
    /// A NeMo archive.
    Nemo,
}

/// Names one adapter, as TensorRT-LLM's `LoRARequest` does; the JSON form has the same fields.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraRequest {
    /// Name in messages, metrics and URLs; see [`validate_adapter_name`].
    pub lora_name: String,
    /// The caller's id of the adapter; 0 is valid.
    pub lora_int_id: i64,
    /// Directory or file of the adapter.
    #[serde(default)]
    pub lora_path: PathBuf,
    /// Format of that directory or file.
    #[serde(default)]
    pub lora_ckpt_source: CkptSource,
}

impl LoraRequest {
    /// A request for the PEFT adapter at `path`.
    pub fn new(name: impl Into<String>, int_id: i64, path: impl Into<PathBuf>) -> Self {
        Self {
            lora_name: name.into(),
            lora_int_id: int_id,
            lora_path: path.into(),
            lora_ckpt_source: CkptSource::Hf,
        }
    }

    /// The same request with another format.
    #[must_use]
    pub fn with_ckpt_source(mut self, source: CkptSource) -> Self {
        self.lora_ckpt_source = source;
        self
    }

    /// The rules that the request breaks; includes whether the path exists.
    pub fn validate(&self) -> Vec<Rejection> {
        let mut problems = Vec::new();
        if let Err(problem) = validate_adapter_name(&self.lora_name) {
            problems.push(problem);
        }
        let path = &self.lora_path;
        let found = if path.as_os_str().is_empty() {
            "an empty path".to_owned()
        } else if !path.exists() {
            format!("`{}`, which does not exist", path.display())
        } else {
            return problems;
        };
        problems.push(Rejection::new(
            Code::AdapterPath,
            "lora_path",
            found,
            "an existing adapter directory or file",
            "give the path of the adapter on this machine",
        ));
        problems
    }
}

/// Checks that a name can be used in metric labels, comma-separated lists and URLs.
///
/// # Errors
/// An empty name; a comma, a control character, or a leading `/`.
pub fn validate_adapter_name(name: &str) -> Result<(), Rejection> {
    let found = if name.is_empty() {
        "an empty name".to_owned()
    } else if name.contains(',') || name.starts_with('/') || name.chars().any(char::is_control) {
        format!("{name:?}")
    } else {
        return Ok(());
    };
    Err(Rejection::new(
        Code::InvalidAdapterName,
        "lora_name",
        found,
        "a name without commas and control characters that does not start with `/`",
        "rename the adapter",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_carried_are_refused() {
        for name in ["", "a,b", "/etc", "a\nb", "\u{7f}"] {
            assert_eq!(validate_adapter_name(name).unwrap_err().code, Code::InvalidAdapterName);
        }
        for name in ["sql", "base:sql", "org/sql", "naïve 2"] {
            assert!(validate_adapter_name(name).is_ok());
        }
    }

    #[test]
    fn a_request_needs_a_path_that_exists() {
        let dir = tempfile::tempdir().unwrap();
        assert!(LoraRequest::new("a", 0, dir.path()).validate().is_empty());
        for path in ["".into(), dir.path().join("absent")] {
            let problems = LoraRequest::new("a", 0, path).validate();
            assert_eq!(problems[0].code, Code::AdapterPath);
        }
    }

    #[test]
    fn the_json_form_has_the_original_field_names() {
        let json =
            r#"{"lora_name": "t", "lora_int_id": 0, "lora_path": "p", "lora_ckpt_source": "nemo"}"#;
        let request: LoraRequest = serde_json::from_str(json).unwrap();
        assert_eq!(request, LoraRequest::new("t", 0, "p").with_ckpt_source(CkptSource::Nemo));
        assert!(serde_json::from_str::<LoraRequest>(r#"{"lora_name": "t"}"#).is_err());
    }
}
