//! A tokenizer with its compiler of guides.

use std::sync::OnceLock;

use crate::grammar::{GuideCompiler, GuideError};
use crate::text::Tokenizer;

/// A tokenizer and what guides need of it.
pub(in crate::llm) struct Tokens {
    pub tokenizer: Tokenizer,
    /// Made when the first request has a guide.
    compiler: OnceLock<Result<GuideCompiler, GuideError>>,
}

impl From<Tokenizer> for Tokens {
    fn from(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, compiler: OnceLock::new() }
    }
}

impl Tokens {
    /// Compiles guides for a model with `vocab` tokens.
    ///
    /// # Errors
    /// Why this tokenizer cannot have guides.
    pub fn guide_compiler(&self, vocab: usize) -> Result<&GuideCompiler, GuideError> {
        let make = || GuideCompiler::new(&self.tokenizer, vocab);
        self.compiler.get_or_init(make).as_ref().map_err(Clone::clone)
    }
}
