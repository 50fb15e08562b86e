//! Reading the tokenizer, chat template and generation config that trainers save with an adapter.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use lora_core::files;
use serde::Deserialize;

use super::tokenizer_config::{CONFIG_FILE, TEMPLATE_FILE, parse, read_if_present};
use super::{TextError, TokenIds, Tokenizer, TokenizerConfig};

const TOKENIZER: &str = "tokenizer.json";
const GENERATION: &str = "generation_config.json";
const ADDED_TOKENS: &str = "added_tokens.json";

/// Vocabulary files of slow tokenizers, which are not read; `tokenizer.json` has the same contents.
const UNREAD: [&str; 4] = ["tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"];

/// The files in an adapter's folder that concern text, before they are compared with the model's.
#[derive(Clone, Debug, Default)]
pub struct AdapterTextFiles {
    dir: PathBuf,
    /// Content of `tokenizer.json`.
    pub tokenizer: Option<Vec<u8>>,
    /// Chat template and special tokens, from `chat_template.jinja` and `tokenizer_config.json`.
    pub config: TokenizerConfig,
    /// `eos_token_id` of `generation_config.json`.
    pub end_ids: Option<Vec<u32>>,
    /// `added_tokens.json`: tokens that a slow tokenizer adds to its vocabulary.
    pub added_tokens: BTreeMap<String, u32>,
}

impl AdapterTextFiles {
    /// Reads those of these files that the folder has. A path that is no folder has none.
    ///
    /// # Errors
    /// [`TextError::Read`] for a file that is not regular, too large or unreadable,
    /// [`TextError::TokenizerConfig`] for JSON of another shape, [`TextError::NoDefaultTemplate`].
    pub fn read(dir: &Path) -> Result<Self, TextError> {
        if !dir.is_dir() {
            return Ok(Self::default());
        }
        #[derive(Deserialize)]
        struct Generation {
            eos_token_id: Option<TokenIds>,
        }
        let generation: Option<Generation> = read_json(&dir.join(GENERATION))?;
        Ok(Self {
            dir: dir.to_owned(),
            tokenizer: read_tokenizer(&dir.join(TOKENIZER))?,
            config: TokenizerConfig::from_model_dir(dir)?,
            end_ids: generation.and_then(|g| g.eos_token_id).map(TokenIds::into_vec),
            added_tokens: read_json(&dir.join(ADDED_TOKENS))?.unwrap_or_default(),
        })
    }

    /// Parses `bytes`, the content of the folder's `tokenizer.json`.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] naming the file.
    pub(crate) fn parse_tokenizer(&self, bytes: &[u8]) -> Result<Tokenizer, TextError> {
        Tokenizer::parse(bytes, || self.dir.join(TOKENIZER).display().to_string())
    }

    /// Name of the file that the chat template comes from.
    pub(crate) fn template_file(&self) -> &'static str {
        if files::is_present(&self.dir.join(TEMPLATE_FILE)) { TEMPLATE_FILE } else { CONFIG_FILE }
    }

    /// Vocabulary files that are not read although the folder has no `tokenizer.json`.
    pub(crate) fn unread(&self) -> Vec<&'static str> {
        let present =
            |name: &&str| self.tokenizer.is_none() && files::is_present(&self.dir.join(name));
        if self.dir.as_os_str().is_empty() {
            return Vec::new();
        }
        UNREAD.into_iter().filter(present).collect()
    }

    /// Descriptions of the parts that the folder has, for reports without a model to compare with.
    pub fn present(&self) -> Vec<&'static str> {
        let parts = [
            (self.config.chat_template.is_some(), "chat template"),
            (self.tokenizer.is_some(), "tokenizer"),
            (!self.added_tokens.is_empty(), "added tokens"),
            (self.end_ids.is_some() || self.config.eos_token.is_some(), "end tokens"),
        ];
        parts.into_iter().filter(|(present, _)| *present).map(|(_, name)| name).collect()
    }
}

fn read_tokenizer(path: &Path) -> Result<Option<Vec<u8>>, TextError> {
    match files::read(path, files::MAX_TOKENIZER) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(reason) => Err(TextError::Read { path: path.to_path_buf(), reason }),
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, TextError> {
    read_if_present(path)?.map(|text| parse(&text, path)).transpose()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn each_file_is_read_if_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        assert!(AdapterTextFiles::read(&dir.path().join("absent")).unwrap().present().is_empty());
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write(GENERATION, r#"{"eos_token_id": [3, 4], "top_p": 0.5}"#);
        write(ADDED_TOKENS, r#"{"<tool>": 9}"#);
        write("vocab.json", "{}");
        let files = AdapterTextFiles::read(dir.path()).unwrap();
        assert_eq!(files.end_ids, Some(vec![3, 4]));
        assert_eq!(files.added_tokens["<tool>"], 9);
        assert_eq!(files.present(), ["added tokens", "end tokens"]);
        assert_eq!(files.unread(), ["vocab.json"]);
        write(TOKENIZER, "{}");
        assert!(AdapterTextFiles::read(dir.path()).unwrap().unread().is_empty());
    }

    #[test]
    fn a_broken_file_is_named() {
        for (name, text) in [
            (GENERATION, r#"{"eos_token_id": "</s>"}"#),
            (GENERATION, r#"{"eos_token_id": -1}"#),
            (ADDED_TOKENS, r#"["<tool>"]"#),
            (CONFIG_FILE, "{"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(name), text).unwrap();
            let message = AdapterTextFiles::read(dir.path()).unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        }
    }
}
