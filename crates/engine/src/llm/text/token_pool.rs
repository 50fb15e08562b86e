//! Sharing of equal tokenizers among adapters.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::tokens::Tokens;

/// The tokenizers in use, by the hash of their `tokenizer.json`. Adapters often have the same file, and a
/// vocabulary takes tens of megabytes.
#[derive(Default)]
pub(in crate::llm) struct TokenPool {
    known: Mutex<HashMap<blake3::Hash, Weak<Tokens>>>,
}

impl TokenPool {
    /// The tokenizer of a file with this hash, if it is in use.
    pub fn get(&self, file: &blake3::Hash) -> Option<Arc<Tokens>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(file).and_then(Weak::upgrade)
    }

    /// Adds a tokenizer, for as long as it is in use.
    pub fn remember(&self, file: blake3::Hash, tokens: &Arc<Tokens>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, tokens| tokens.strong_count() > 0);
        known.insert(file, Arc::downgrade(tokens));
    }
}
