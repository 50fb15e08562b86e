//! Tokenizer, chat template and end tokens of a model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_core::files;

use super::tokens::Tokens;
use crate::grammar::GuideMatcher;
use crate::llm::LlmError;
use crate::model::{Gguf, ModelConfig};
use crate::sampling::SamplingParams;
use crate::text::{
    ChatMessage, ChatTemplate, SpecialTokens, TextError, Tokenizer, TokenizerConfig,
};

/// The tokenizer and chat template of a model, if it has them, and its end tokens. For adapters that have
/// their own, see [`crate::AdapterText`].
#[derive(Clone)]
pub struct TextModel {
    path: PathBuf,
    pub(in crate::llm) tokens: Option<Arc<Tokens>>,
    /// Special tokens and source of the chat template.
    pub(in crate::llm) config: TokenizerConfig,
    pub(in crate::llm) chat: Option<ChatTemplate>,
    pub(in crate::llm) end_ids: Vec<u32>,
    /// Vocabulary size of the model, which may exceed the tokenizer's.
    pub(in crate::llm) vocab: usize,
}

impl TextModel {
    /// Without tokenizer and chat template: requests and outputs consist of token ids.
    pub fn none(path: &Path, model: &ModelConfig) -> Self {
        Self {
            path: path.to_owned(),
            tokens: None,
            config: TokenizerConfig::default(),
            chat: None,
            end_ids: model.eos_ids.clone(),
            vocab: model.vocab,
        }
    }

    /// Reads the tokenizer and chat template of the model at `path`, a folder or a `.gguf` file.
    ///
    /// # Errors
    /// [`LlmError::Model`] or [`LlmError::Text`], naming the file.
    pub fn of_model(path: &Path) -> Result<Self, LlmError> {
        if !path.is_dir() {
            let gguf = Gguf::open(path)?;
            return Self::from_gguf(path, &gguf);
        }
        let model = ModelConfig::from_dir(path)?;
        if files::is_present(&path.join("tokenizer.json")) {
            Self::from_dir(path, &model)
        } else {
            Ok(Self::none(path, &model))
        }
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`LlmError::NoTokenizer`].
    pub fn tokenizer(&self) -> Result<&Tokenizer, LlmError> {
        self.tokens().map(|tokens| &tokens.tokenizer)
    }

    pub(in crate::llm) fn tokens(&self) -> Result<&Tokens, LlmError> {
        self.tokens.as_deref().ok_or_else(|| LlmError::NoTokenizer { path: self.path.clone() })
    }

    /// Compiles the guide of a request, if it has one.
    ///
    /// # Errors
    /// [`LlmError::Sampling`] or [`LlmError::Guide`], or [`LlmError::NoTokenizer`].
    pub(in crate::llm) fn compile_guide(
        &self,
        params: &SamplingParams,
    ) -> Result<Option<GuideMatcher>, LlmError> {
        let Some(guided) = &params.guided_decoding else { return Ok(None) };
        let guide = guided.guide()?;
        Ok(Some(self.tokens()?.guide_compiler(self.vocab)?.compile(&guide)?))
    }

    /// Ids of the tokens that end an output.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// Reads the tokenizer and chat template of a folder. The end tokens are those of `model`.
    ///
    /// # Errors
    /// [`LlmError::Text`] naming the file.
    pub fn from_dir(dir: &Path, model: &ModelConfig) -> Result<Self, LlmError> {
        let tokenizer = Tokenizer::from_file(&dir.join("tokenizer.json"))?;
        let config = TokenizerConfig::from_model_dir(dir)?;
        Ok(Self::none(dir, model).with_text(tokenizer, config)?)
    }

    /// Builds them from the metadata of a GGUF file.
    ///
    /// # Errors
    /// [`LlmError::Model`] or [`LlmError::Text`].
    pub fn from_gguf(path: &Path, gguf: &Gguf) -> Result<Self, LlmError> {
        let text = gguf.text()?;
        let spelling =
            |id: Option<u32>| id.and_then(|id| text.vocab.tokens.get(id as usize)).cloned();
        let config = TokenizerConfig {
            bos_token: spelling(text.vocab.bos),
            eos_token: spelling(text.vocab.eos),
            pad_token: None,
            chat_template: text.chat_template,
        };
        let tokenizer = Tokenizer::try_from(text.vocab)?;
        Ok(Self::none(path, gguf.config()).with_text(tokenizer, config)?)
    }

    fn with_text(self, tokenizer: Tokenizer, config: TokenizerConfig) -> Result<Self, TextError> {
        let chat = ChatTemplate::from_config(&config)?;
        Ok(Self { tokens: Some(Arc::new(tokenizer.into())), config, chat, ..self })
    }

    /// Renders a conversation, with the generation prompt of the assistant at its end.
    ///
    /// # Errors
    /// [`LlmError::NoChatTemplate`], or the error of the template.
    pub fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, LlmError> {
        let template = self
            .chat
            .as_ref()
            .ok_or_else(|| LlmError::NoChatTemplate { path: self.path.clone() })?;
        Ok(template.render(messages, true)?)
    }

    /// Renders and tokenizes a conversation, with the generation prompt of the assistant at its end.
    ///
    /// # Errors
    /// As [`TextModel::render_chat`], or the error of the tokenizer.
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<(String, Vec<u32>), LlmError> {
        let prompt = self.render_chat(messages)?;
        let ids = self.tokenizer()?.encode(&prompt, SpecialTokens::Skip)?;
        Ok((prompt, ids))
    }
}
