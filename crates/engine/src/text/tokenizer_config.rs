//! Reading the special tokens and chat template of `tokenizer_config.json` and `chat_template.jinja`.

use std::path::Path;

use lora_core::files;
use serde::{Deserialize, de::DeserializeOwned};

use super::TextError;

pub(super) const CONFIG_FILE: &str = "tokenizer_config.json";
pub(super) const TEMPLATE_FILE: &str = "chat_template.jinja";

/// The chat template and special tokens of a model's folder.
///
/// Other fields of `tokenizer_config.json` are ignored: they describe Python classes or repeat
/// `tokenizer.json`. In particular `clean_up_tokenization_spaces` is not applied, as text that was already
/// streamed cannot be changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizerConfig {
    /// Spelling of the BOS token.
    pub bos_token: Option<String>,
    /// Spelling of the EOS token.
    pub eos_token: Option<String>,
    /// Spelling of the padding token, which is used in training only.
    pub pad_token: Option<String>,
    /// Source of the chat template: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`. Of
    /// several named templates, the one named `default`.
    pub chat_template: Option<String>,
}

impl TokenizerConfig {
    /// Reads the two files from `dir`; either may be missing.
    ///
    /// # Errors
    /// [`TextError::Read`], [`TextError::TokenizerConfig`] for JSON of another shape, and
    /// [`TextError::NoDefaultTemplate`].
    pub fn from_model_dir(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join(CONFIG_FILE);
        let fields = match read_if_present(&path)? {
            None => Fields::default(),
            Some(text) => parse(&text, &path)?,
        };
        let chat_template = match (read_if_present(&dir.join(TEMPLATE_FILE))?, fields.chat_template)
        {
            (Some(source), _) | (None, Some(Template::One(source))) => Some(source),
            (None, Some(Template::Named(all))) => Some(default_of(all, &path)?),
            (None, None) => None,
        };
        Ok(Self {
            bos_token: fields.bos_token.map(Token::spelling),
            eos_token: fields.eos_token.map(Token::spelling),
            pad_token: fields.pad_token.map(Token::spelling),
            chat_template,
        })
    }
}

#[derive(Default, Deserialize)]
struct Fields {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    pad_token: Option<Token>,
    chat_template: Option<Template>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or an object with `content`")]
enum Token {
    Plain(String),
    Added { content: String },
}

impl Token {
    fn spelling(self) -> String {
        match self {
            Self::Plain(content) | Self::Added { content } => content,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of objects with `name` and `template`")]
enum Template {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// Parses the JSON of a file beside the tokenizer.
pub(super) fn parse<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T, TextError> {
    let mut json = serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let (path, reason) = (path.to_path_buf(), error.to_string());
        TextError::TokenizerConfig { path, reason }
    })
}

fn default_of(all: Vec<NamedTemplate>, path: &Path) -> Result<String, TextError> {
    let names = all.iter().map(|template| template.name.clone()).collect();
    let default = all.into_iter().find(|template| template.name == "default");
    default
        .map(|template| template.template)
        .ok_or_else(|| TextError::NoDefaultTemplate { path: path.to_path_buf(), names })
}

pub(super) fn read_if_present(path: &Path) -> Result<Option<String>, TextError> {
    let text = files::is_present(path).then(|| files::read_text(path, files::MAX_CONFIG));
    text.transpose().map_err(|reason| TextError::Read { path: path.to_path_buf(), reason })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn config(json: &str, jinja: Option<&str>) -> Result<TokenizerConfig, TextError> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG_FILE), json).unwrap();
        if let Some(jinja) = jinja {
            fs::write(dir.path().join(TEMPLATE_FILE), jinja).unwrap();
        }
        TokenizerConfig::from_model_dir(dir.path())
    }

    #[test]
    fn tokens_are_strings_or_objects() {
        let json = r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>"}"#;
        let config = config(json, None).unwrap();
        assert_eq!(config.bos_token.as_deref(), Some("<s>"));
        assert_eq!(config.eos_token.as_deref(), Some("</s>"));
        assert_eq!(config.chat_template, None);
    }

    #[test]
    fn the_jinja_file_comes_before_the_json() {
        let json = r#"{"bos_token": null, "chat_template": "json"}"#;
        let source = |jinja| config(json, jinja).unwrap().chat_template;
        assert_eq!(source(Some("file")).as_deref(), Some("file"));
        assert_eq!(source(None).as_deref(), Some("json"));
    }

    #[test]
    fn of_named_templates_the_default_one_is_used() {
        let named = |name| {
            let json = r#"{"chat_template": [{"name": "tool_use", "template": "t"},
                {"name": "NAME", "template": "d"}]}"#;
            config(&json.replace("NAME", name), None)
        };
        assert_eq!(named("default").unwrap().chat_template.as_deref(), Some("d"));
        let message = named("rag").unwrap_err().to_string();
        assert!(message.contains("[tool_use, rag]"), "{message}");
    }

    #[test]
    fn a_field_of_another_type_is_named() {
        let message = config(r#"{"eos_token": 2}"#, None).unwrap_err().to_string();
        assert!(message.contains("eos_token") && message.contains("`content`"), "{message}");
    }

    #[test]
    fn a_folder_without_the_files_has_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let config = TokenizerConfig::from_model_dir(dir.path()).unwrap();
        assert_eq!(config, TokenizerConfig::default());
    }
}
