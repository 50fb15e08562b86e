//! Errors of starting an engine and of requests.

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;

use lora_core::{Pool, Rejections, free_bytes};
use thiserror::Error;

use crate::adapters::RegistryError;
use crate::core::SequenceError;
use crate::grammar::GuideError;
use crate::model::ModelError;
use crate::sampling::SamplingError;
use crate::text::TextError;

/// An error of an engine or a request. Messages name the setting, the value found and the values allowed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LlmError {
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(ModelError),
    /// The tokenizer or the chat template failed.
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
    /// A parameter of a request is out of range for the model or the engine.
    #[error("{parameter} is {found}; allowed: {allowed}")]
    Parameter {
        /// The parameter.
        parameter: &'static str,
        /// Its value.
        found: String,
        /// The values allowed.
        allowed: String,
    },
    /// The KV cache's share of the device memory is less than one block.
    #[error(
        "free_gpu_memory_fraction is {share}: that share of the {free} bytes that weights, activations \
         and adapters leave free is less than one KV block of {block} bytes; raise it, or lower \
         max_batch_size, max_num_tokens, max_loras or device_cache_percent"
    )]
    NoRoomForKv {
        /// The share.
        share: f64,
        /// Free bytes, of which it is a share.
        free: usize,
        /// Bytes of a block.
        block: usize,
    },
    /// The host's free memory cannot hold one KV block.
    #[error(
        "the {free} bytes of memory that are free do not hold one KV block of {block} bytes beside what \
         other programs need; end other programs, or lower max_batch_size or max_num_tokens"
    )]
    NoHostRoomForKv {
        /// Free bytes.
        free: usize,
        /// Bytes of a block.
        block: usize,
    },
    /// The device is out of memory.
    #[error(
        "the device is full: {requested} bytes were asked for {}, {}; {}",
        part(*pool).0, free_bytes(*available), part(*pool).1
    )]
    OutOfMemory {
        /// What the memory was for.
        pool: Pool,
        /// Bytes requested.
        requested: usize,
        /// Free bytes, if known.
        available: Option<usize>,
    },
    /// The prompt has no tokens.
    #[error("the prompt is empty; it must have at least one token")]
    EmptyPrompt,
    /// The prompt leaves no room for a generated token.
    #[error(
        "the prompt has {found} tokens, but max_seq_len is {max_seq_len}: a prompt may have at \
         most {} tokens; shorten it or set truncate_prompt_tokens", max_seq_len - 1
    )]
    PromptTooLong {
        /// Its tokens.
        found: usize,
        /// The engine's limit for prompt and generated tokens together.
        max_seq_len: usize,
    },
    /// The prompt's text is too long to be tokenized.
    #[error(
        "the prompt has {bytes} bytes, but at most {limit} are tokenized, as max_seq_len is {max_seq_len} \
         tokens; shorten it"
    )]
    PromptTooLarge {
        /// Bytes of the text.
        bytes: usize,
        /// Most bytes that are tokenized.
        limit: usize,
        /// The engine's limit for prompt and generated tokens together.
        max_seq_len: usize,
    },
    /// A token id is not in the vocabulary.
    #[error("input_ids[{index}] is {found}; the model's vocabulary has ids 0 to {}", vocab - 1)]
    TokenId {
        /// Index in the prompt.
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
    /// The model has no tokenizer.
    #[error("{path} has no tokenizer; give input_ids, or a folder with tokenizer.json")]
    NoTokenizer {
        /// The model.
        path: PathBuf,
    },
    /// The model has no chat template.
    #[error("{path} has no chat template; give a prompt instead of messages")]
    NoChatTemplate {
        /// The model.
        path: PathBuf,
    },
    /// The engine failed during a request.
    #[error("the engine failed while it ran this request: {0}")]
    Failed(String),
    /// The operating system refused a thread.
    #[error("cannot start {what}: {cause}; raise the limit of threads, or end other programs")]
    Thread {
        /// The task of the thread.
        what: String,
        /// The operating system's error.
        cause: std::io::Error,
    },
    /// The engine thread has stopped.
    #[error("the engine has stopped; start a new one")]
    Stopped,
}

/// Category of an error: which side has to correct it. Commands derive their exit code from it, and servers
/// the status of their response.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting of the engine is wrong, or incompatible with the model.
    Setting,
    /// The model cannot be loaded, or does not fit the device.
    Model,
    /// The request is wrong, whatever the state of the engine.
    Request,
    /// The request names an adapter that is not registered, or whose files are missing.
    AdapterNotFound,
    /// The adapter was found but cannot be used.
    AdapterRefused,
    /// The engine failed during the request; other requests may succeed.
    Failed,
    /// The engine has stopped.
    Stopped,
}

impl LlmError {
    /// Category of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Setting { .. } | Self::LoraConfig(_) => ErrorKind::Setting,
            Self::Model(_)
            | Self::NoRoomForKv { .. }
            | Self::NoHostRoomForKv { .. }
            | Self::OutOfMemory { .. } => ErrorKind::Model,
            Self::Text(error) if !error.is_of_request() => ErrorKind::Model,
            Self::Text(_)
            | Self::Parameter { .. }
            | Self::Sampling(_)
            | Self::Guide(_)
            | Self::EmptyPrompt
            | Self::PromptTooLong { .. }
            | Self::PromptTooLarge { .. }
            | Self::TokenId { .. }
            | Self::ListLength { .. }
            | Self::NoTokenizer { .. }
            | Self::NoChatTemplate { .. } => ErrorKind::Request,
            Self::Adapter(error) if error.is_of_request() => ErrorKind::Request,
            Self::Adapter(error) if error.is_not_found() => ErrorKind::AdapterNotFound,
            Self::Adapter(_) => ErrorKind::AdapterRefused,
            Self::Thread { .. } | Self::Failed(_) => ErrorKind::Failed,
            Self::Stopped => ErrorKind::Stopped,
        }
    }

    /// The rules that settings, a request or its adapter break, if that is the reason.
    pub fn rejections(&self) -> Option<&Rejections> {
        match self {
            Self::LoraConfig(rejections) => Some(rejections),
            Self::Adapter(error) => error.rejections(),
            _ => None,
        }
    }

    pub(super) fn parameter(
        parameter: &'static str,
        found: impl Display,
        allowed: impl Into<String>,
    ) -> Self {
        Self::Parameter { parameter, found: found.to_string(), allowed: allowed.into() }
    }

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

/// Purpose of a memory pool, and the settings that reduce it.
fn part(pool: Pool) -> (&'static str, &'static str) {
    match pool {
        Pool::Weights => ("weights", "quantise the model by quant_config, or take a smaller one"),
        Pool::Adapters => ("adapters", "lower max_loras, max_lora_rank or device_cache_percent"),
        Pool::Kv => ("keys and values", "lower kv_cache_config.max_tokens"),
        Pool::Activations => ("activations", "lower max_num_tokens or max_batch_size"),
        Pool::StepInputs => ("inputs of a step", "lower max_batch_size or max_seq_len"),
    }
}

impl From<ModelError> for LlmError {
    fn from(error: ModelError) -> Self {
        use lora_core::Error::OutOfMemory;
        match error {
            ModelError::Device(OutOfMemory { pool, requested, available }) => {
                Self::OutOfMemory { pool, requested, available }
            }
            error => Self::Model(error),
        }
    }
}

impl From<lora_core::Error> for LlmError {
    fn from(error: lora_core::Error) -> Self {
        ModelError::from(error).into()
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

#[cfg(test)]
mod tests {
    use lora_core::formats::AdapterError;
    use lora_core::{Code, Rejection};

    use super::*;

    #[test]
    fn rejections_are_found_in_every_variant() {
        let broken = || Rejections(vec![Rejection::new(Code::NoopAdapter, "a", "b", "c", "d")]);
        let (name, path) = ("x".to_owned(), PathBuf::from("p"));
        let unread = AdapterError::Rejected { path: path.clone(), rejections: broken() };
        for error in [
            LlmError::LoraConfig(broken()),
            RegistryError::Rejected { name: name.clone(), cause: broken() }.into(),
            RegistryError::Load { name: name.clone(), cause: unread }.into(),
        ] {
            assert_eq!(error.rejections(), Some(&broken()), "{error}");
        }
        assert!(LlmError::from(RegistryError::Changed { name, path }).rejections().is_none());
        assert!(LlmError::EmptyPrompt.rejections().is_none());
    }

    #[test]
    fn every_error_has_its_kind() {
        let load = |cause| RegistryError::Load { name: "x".to_owned(), cause }.into();
        let missing = AdapterError::Missing { path: "p".into(), what: "this file".to_owned() };
        let damaged = AdapterError::InvalidSafetensors { path: "p".into(), problem: "x".into() };
        let file = TextError::NoDefaultTemplate { path: "p".into(), names: Vec::new() };
        for (error, kind) in [
            (LlmError::setting("max_num_tokens", 0, "1 or more"), ErrorKind::Setting),
            (LlmError::parameter("n", 0, "1 or more"), ErrorKind::Request),
            (LlmError::EmptyPrompt, ErrorKind::Request),
            (TextError::NoMessages.into(), ErrorKind::Request),
            (file.into(), ErrorKind::Model),
            (RegistryError::Unknown { name: "x".to_owned() }.into(), ErrorKind::AdapterNotFound),
            (load(missing), ErrorKind::AdapterNotFound),
            (load(damaged), ErrorKind::AdapterRefused),
            (LlmError::Failed("a step".to_owned()), ErrorKind::Failed),
            (LlmError::Stopped, ErrorKind::Stopped),
        ] {
            assert_eq!(error.kind(), kind, "{error}");
        }
    }
}
