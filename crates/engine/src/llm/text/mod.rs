//! Text of a model and of its adapters: tokenizer, chat template, end tokens, guides.

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
