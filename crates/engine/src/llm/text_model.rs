//! The textual side of a model: tokenizer and chat template.

use std::path::{Path, PathBuf};

use super::LlmError;
use crate::model::Gguf;
use crate::text::{ChatMessage, ChatTemplate, SpecialTokens, TextError, Tokenizer};

/// Tokenizer and chat template, as far as the model has them.
#[derive(Clone)]
pub struct TextModel {
    path: PathBuf,
    tokenizer: Option<Tokenizer>,
    chat: Option<ChatTemplate>,
}

impl TextModel {
    /// No text: such a model takes and gives token ids.
    pub fn none(path: &Path) -> Self {
        Self { path: path.to_owned(), tokenizer: None, chat: None }
    }

    /// Text to ids and back.
    ///
    /// # Errors
    /// [`LlmError::NoTokenizer`].
    pub fn tokenizer(&self) -> Result<&Tokenizer, LlmError> {
        self.tokenizer.as_ref().ok_or_else(|| LlmError::NoTokenizer { path: self.path.clone() })
    }

    /// Reads `tokenizer.json` and the template of a folder.
    ///
    /// # Errors
    /// [`LlmError::Text`] naming the file.
    pub fn from_dir(dir: &Path) -> Result<Self, LlmError> {
        let tokenizer = Tokenizer::from_file(&dir.join("tokenizer.json"))?;
        let chat = match ChatTemplate::from_model_dir(dir) {
            Ok(template) => Some(template),
            Err(TextError::ChatTemplateMissing { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self { path: dir.to_owned(), tokenizer: Some(tokenizer), chat })
    }

    /// Builds them from a GGUF file's metadata.
    ///
    /// # Errors
    /// [`LlmError::Model`] or [`LlmError::Text`].
    pub fn from_gguf(path: &Path, gguf: &Gguf) -> Result<Self, LlmError> {
        let text = gguf.text()?;
        let spelling = |id: Option<u32>| {
            id.and_then(|id| text.vocab.tokens.get(id as usize)).map(String::as_str)
        };
        let (bos, eos) = (spelling(text.vocab.bos), spelling(text.vocab.eos));
        let chat = match &text.chat_template {
            Some(source) => Some(ChatTemplate::from_source(source, bos, eos)?),
            None => None,
        };
        let tokenizer = Tokenizer::try_from(text.vocab)?;
        Ok(Self { path: path.to_owned(), tokenizer: Some(tokenizer), chat })
    }

    /// The text of a conversation, up to where the assistant is to speak.
    ///
    /// # Errors
    /// [`LlmError::NoChatTemplate`], or what the template refuses.
    pub fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, LlmError> {
        let template = self
            .chat
            .as_ref()
            .ok_or_else(|| LlmError::NoChatTemplate { path: self.path.clone() })?;
        Ok(template.render(messages, true)?)
    }

    /// The tokens of a conversation, up to where the assistant is to speak.
    ///
    /// # Errors
    /// As [`TextModel::render_chat`], or what the tokenizer refuses.
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<(String, Vec<u32>), LlmError> {
        let prompt = self.render_chat(messages)?;
        let ids = self.tokenizer()?.encode(&prompt, SpecialTokens::Skip)?;
        Ok((prompt, ids))
    }
}
