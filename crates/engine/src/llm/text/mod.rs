//! Tokenizers, chat templates, end tokens and guide compilers of a model and its adapters.

mod adapter;
mod adapters;
mod changes;
mod model;
mod rules;
mod token_pool;
mod tokens;

pub use adapter::{AdapterText, AdapterTextError};
pub(super) use adapters::AdapterTexts;
pub use changes::TextChanges;
pub use model::TextModel;
