//! From text to token ids and back: tokenizers, streaming detokenisation, stop strings and chat templates.
//!
//! Built on the crates `tokenizers` and `minijinja`. This module configures them so that a prompt gets the ids
//! that the model was trained with, and handles what lies between: characters split over tokens, stop strings
//! that cross token boundaries, and templates written for Python's Jinja.

mod adapter_files;
mod chat;
mod detokenizer;
mod error;
mod gguf_vocab;
mod python_json;
mod stop;
mod strftime;
mod template_bounds;
mod template_budget;
mod template_code;
mod template_env;
mod template_filters;
#[cfg(test)]
pub(crate) mod testkit;
mod token_bytes;
mod token_ids;
mod tokenizer;
mod tokenizer_config;
mod tokenizer_difference;

pub use adapter_files::AdapterTextFiles;
pub use chat::{ChatMessage, ChatTemplate};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use gguf_vocab::GgufVocab;
pub use stop::{StopEvent, StopStrings};
pub(crate) use token_ids::TokenIds;
pub use tokenizer::{SpecialTokens, Tokenizer};
pub use tokenizer_config::TokenizerConfig;
pub use tokenizer_difference::NamedToken;
pub(crate) use tokenizer_difference::{Contradiction, TokenizerDifference};
