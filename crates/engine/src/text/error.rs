//! What can go wrong between text and token ids.

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
        /// What the operating system said.
        reason: io::Error,
    },
    /// A `tokenizer.json` that the tokenizers library refuses.
    #[error("{origin} is not a usable tokenizer: {reason}; save it again with transformers")]
    Tokenizer {
        /// The file, or what stands for it.
        origin: String,
        /// What the library said.
        reason: String,
    },
    /// A `tokenizer_config.json`, `generation_config.json` or `added_tokens.json` that is no JSON or
    /// whose fields have other types than known.
    #[error("{} cannot be used: {reason}; save it again with transformers", path.display())]
    TokenizerConfig {
        /// The file.
        path: PathBuf,
        /// Where and why reading stopped.
        reason: String,
    },
    /// The tokenizer refused a text.
    #[error("the prompt of {bytes} bytes cannot be tokenized: {reason}")]
    Encode {
        /// Length of the text in bytes.
        bytes: usize,
        /// What the library said.
        reason: String,
    },
    /// The tokenizer's decoder refused token ids.
    #[error("{tokens} token ids cannot be turned into text: {reason}")]
    Decode {
        /// How many ids there were.
        tokens: usize,
        /// What the library said.
        reason: String,
    },
    /// The GGUF file's vocabulary is of a kind that is not rebuilt from metadata.
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
    /// The GGUF file's vocabulary contradicts itself.
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
    /// Several named templates, none of them called `default`.
    #[error(
        "`chat_template` in {} offers [{}] but no `default`; rename one of them to `default`",
        path.display(),
        names.join(", ")
    )]
    NoDefaultTemplate {
        /// The `tokenizer_config.json`.
        path: PathBuf,
        /// The names on offer.
        names: Vec<String>,
    },
    /// The template is no valid Jinja.
    #[error("the chat template cannot be compiled: {reason}; correct chat_template.jinja")]
    ChatTemplateSyntax {
        /// The place and the reason.
        reason: String,
    },
    /// The template called `raise_exception`.
    #[error("the model's chat template refuses these messages: {message}")]
    ChatTemplateRefused {
        /// The template's own words.
        message: String,
    },
    /// The template failed while it ran.
    #[error("the chat template failed on these messages: {reason}; correct chat_template.jinja")]
    ChatTemplateFailed {
        /// The place and the reason.
        reason: String,
    },
    /// The template takes more than a template may.
    #[error(
        "the chat template is stopped on these messages at {place}: it {did}; shorten the messages, or \
         correct chat_template.jinja"
    )]
    ChatTemplateTooCostly {
        /// Where it was stopped.
        place: String,
        /// What it does, with the limit.
        did: String,
    },
    /// A chat without messages.
    #[error("`messages` is empty; send at least one message")]
    NoMessages,
    /// A stop string that would match everywhere.
    #[error("stop string number {index} is empty; remove it or give it at least one character")]
    EmptyStopString {
        /// Its index in the list, from 0.
        index: usize,
    },
}

impl TextError {
    /// Whether the text of a request is refused; otherwise a file cannot be used for any request.
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
