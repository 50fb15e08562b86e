//! Tokenizers of adapters, each in memory once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::tokens::Tokens;

/// The tokenizers that are in use, by the hash of their `tokenizer.json`: adapters of one trainer
/// usually have the same file, and a vocabulary takes tens of megabytes.
#[derive(Default)]
pub(in crate::llm) struct TokenPool {
    known: Mutex<HashMap<blake3::Hash, Weak<Tokens>>>,
}

impl TokenPool {
    /// The tokenizer of a file.
    pub fn get(&self, file: &blake3::Hash) -> Option<Arc<Tokens>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(file).and_then(Weak::upgrade)
    }

    /// Remembers it for as long as somebody uses it.
    pub fn remember(&self, file: blake3::Hash, tokens: &Arc<Tokens>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, tokens| tokens.strong_count() > 0);
        known.insert(file, Arc::downgrade(tokens));
    }
}
