//! Why an engine cannot start, or a request cannot run.

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;

use lora_core::Rejections;
use thiserror::Error;

use crate::adapters::RegistryError;
use crate::core::SequenceError;
use crate::grammar::GuideError;
use crate::model::ModelError;
use crate::sampling::SamplingError;
use crate::text::TextError;

/// What went wrong; each message names the thing, the value found and the value allowed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LlmError {
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer or the chat template refused.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Sampling parameters are out of range.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The guide cannot be followed.
    #[error(transparent)]
    Guide(#[from] GuideError),
    /// The adapter cannot be used.
    #[error(transparent)]
    Adapter(#[from] Arc<RegistryError>),
    /// The LoRA settings break rules.
    #[error(transparent)]
    LoraConfig(#[from] Rejections),
    /// A setting of the engine is out of range.
    #[error("{setting} is {found}; allowed: {allowed}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// Its value.
        found: String,
        /// The values allowed.
        allowed: String,
    },
    /// The prompt has no tokens.
    #[error("the prompt is empty; it must have at least one token")]
    EmptyPrompt,
    /// The prompt leaves no room for a token.
    #[error(
        "the prompt has {found} tokens, but max_seq_len is {max_seq_len}: a prompt may have at \
         most {} tokens; shorten it or set truncate_prompt_tokens", max_seq_len - 1
    )]
    PromptTooLong {
        /// Its tokens.
        found: usize,
        /// The engine's limit for prompt and answer together.
        max_seq_len: usize,
    },
    /// A token id is not in the vocabulary.
    #[error("input_ids[{index}] is {found}; the model's vocabulary has ids 0 to {}", vocab - 1)]
    TokenId {
        /// Where.
        index: usize,
        /// The id.
        found: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A list does not have an entry for each prompt.
    #[error("{what} has {found} entries for {prompts} prompts; give one for each, or a single one")]
    ListLength {
        /// Which list.
        what: &'static str,
        /// Its length.
        found: usize,
        /// Number of prompts.
        prompts: usize,
    },
    /// There is no tokenizer.
    #[error("{path} has no tokenizer; give input_ids, or a folder with tokenizer.json")]
    NoTokenizer {
        /// The model.
        path: PathBuf,
    },
    /// There is no chat template.
    #[error("{path} has no chat template; give a prompt instead of messages")]
    NoChatTemplate {
        /// The model.
        path: PathBuf,
    },
    /// The engine ended a request.
    #[error("the engine failed while it ran this request: {0}")]
    Failed(String),
    /// The engine thread is gone.
    #[error("the engine has stopped; start a new one")]
    Stopped,
}

impl LlmError {
    pub(super) fn setting(
        setting: &'static str,
        found: impl Display,
        allowed: impl Into<String>,
    ) -> Self {
        Self::Setting { setting, found: found.to_string(), allowed: allowed.into() }
    }
}

impl From<RegistryError> for LlmError {
    fn from(error: RegistryError) -> Self {
        Self::Adapter(Arc::new(error))
    }
}

impl From<lora_core::Error> for LlmError {
    fn from(error: lora_core::Error) -> Self {
        Self::Model(error.into())
    }
}

impl From<SequenceError> for LlmError {
    fn from(error: SequenceError) -> Self {
        match error {
            SequenceError::Adapter(error) => Self::Adapter(error),
            SequenceError::Guide(error) => Self::Guide(error),
            SequenceError::Step(cause) => Self::Failed(cause),
        }
    }
}
