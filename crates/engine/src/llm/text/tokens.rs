//! A tokenizer with its guide compiler.

use std::sync::OnceLock;

use crate::grammar::{GuideCompiler, GuideError};
use crate::text::Tokenizer;

/// A tokenizer and the guide compiler for its vocabulary.
pub(in crate::llm) struct Tokens {
    pub tokenizer: Tokenizer,
    /// Built at the first request with a guide, as that takes a while.
    compiler: OnceLock<Result<GuideCompiler, GuideError>>,
}

impl From<Tokenizer> for Tokens {
    fn from(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, compiler: OnceLock::new() }
    }
}

impl Tokens {
    /// The guide compiler for a model with `vocab` tokens.
    ///
    /// # Errors
    /// [`GuideError`] if guides cannot be used with this tokenizer.
    pub fn guide_compiler(&self, vocab: usize) -> Result<&GuideCompiler, GuideError> {
        let make = || GuideCompiler::new(&self.tokenizer, vocab);
        self.compiler.get_or_init(make).as_ref().map_err(Clone::clone)
    }
}
