//! Errors of tokenizers, chat templates and stop strings.

use std::{io, path::PathBuf};

/// An error of tokenizing, detokenising, stop strings or chat templates.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A file could not be read.
    #[error("cannot read {}: {reason}; check that it is a file and readable", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        reason: io::Error,
    },
    /// The tokenizers library rejects a `tokenizer.json`.
    #[error("{origin} is not a usable tokenizer: {reason}; save it again with transformers")]
    Tokenizer {
        /// The file, or a description of the source.
        origin: String,
        /// The library's error.
        reason: String,
    },
    /// A `tokenizer_config.json`, `generation_config.json` or `added_tokens.json` is invalid JSON, or has a
    /// field of an unexpected type.
    #[error("{} cannot be used: {reason}; save it again with transformers", path.display())]
    TokenizerConfig {
        /// The file.
        path: PathBuf,
        /// The field and the error.
        reason: String,
    },
    /// The tokenizer failed on a text.
    #[error("the prompt of {bytes} bytes cannot be tokenized: {reason}")]
    Encode {
        /// Length of the text in bytes.
        bytes: usize,
        /// The library's error.
        reason: String,
    },
    /// The tokenizer's decoder failed on token ids.
    #[error("{tokens} token ids cannot be turned into text: {reason}")]
    Decode {
        /// Number of ids.
        tokens: usize,
        /// The library's error.
        reason: String,
    },
    /// The GGUF file's tokenizer is of an unsupported kind.
    #[error(
        "`{key}` is `{found}`, but a tokenizer can be built from a GGUF file only for {allowed}; \
         put the model's tokenizer.json beside the file"
    )]
    GgufUnsupported {
        /// The metadata key.
        key: &'static str,
        /// Its value.
        found: String,
        /// The values that are supported.
        allowed: &'static str,
    },
    /// The GGUF file's tokenizer metadata is inconsistent.
    #[error("`{key}` {problem}; download the GGUF file again or put tokenizer.json beside it")]
    GgufInvalid {
        /// The metadata key.
        key: &'static str,
        /// What is wrong with its value.
        problem: String,
    },
    /// The model has no chat template.
    #[error(
        "{} has neither chat_template.jinja nor a `chat_template` in tokenizer_config.json; \
         add one, or send a plain prompt instead of messages",
        dir.display()
    )]
    ChatTemplateMissing {
        /// The model's folder.
        dir: PathBuf,
    },
    /// Several named templates, none of them named `default`.
    #[error(
        "`chat_template` in {} offers [{}] but no `default`; rename one of them to `default`",
        path.display(),
        names.join(", ")
    )]
    NoDefaultTemplate {
        /// The `tokenizer_config.json`.
        path: PathBuf,
        /// The names.
        names: Vec<String>,
    },
    /// The template is invalid Jinja.
    #[error("the chat template cannot be compiled: {reason}; correct chat_template.jinja")]
    ChatTemplateSyntax {
        /// The place and the reason.
        reason: String,
    },
    /// The template called `raise_exception`.
    #[error("the model's chat template refuses these messages: {message}")]
    ChatTemplateRefused {
        /// The template's message.
        message: String,
    },
    /// The template failed while it was rendered.
    #[error("the chat template failed on these messages: {reason}; correct chat_template.jinja")]
    ChatTemplateFailed {
        /// The place and the reason.
        reason: String,
    },
    /// The template exceeded a limit of time or memory.
    #[error(
        "the chat template is stopped on these messages at {place}: it {did}; shorten the messages, or \
         correct chat_template.jinja"
    )]
    ChatTemplateTooCostly {
        /// Where it was stopped.
        place: String,
        /// What it did, with the limit.
        did: String,
    },
    /// A chat without messages.
    #[error("`messages` is empty; send at least one message")]
    NoMessages,
    /// An empty stop string, which would match everywhere.
    #[error("stop string number {index} is empty; remove it or give it at least one character")]
    EmptyStopString {
        /// Its index in the list, from 0.
        index: usize,
    },
}

impl TextError {
    /// Whether the error concerns one request. Otherwise a file is unusable, for any request.
    pub fn is_of_request(&self) -> bool {
        matches!(
            self,
            Self::Encode { .. }
                | Self::Decode { .. }
                | Self::ChatTemplateMissing { .. }
                | Self::ChatTemplateRefused { .. }
                | Self::ChatTemplateFailed { .. }
                | Self::ChatTemplateTooCostly { .. }
                | Self::NoMessages
                | Self::EmptyStopString { .. }
        )
    }
}
