//! Guides of requests, compiled against a tokenizer.

use std::sync::OnceLock;

use super::{LlmError, TextModel};
use crate::grammar::{GuideCompiler, GuideError, GuideMatcher};
use crate::sampling::SamplingParams;
use crate::text::Tokenizer;

/// A tokenizer and what guides need of it.
pub(super) struct Tokens {
    pub tokenizer: Tokenizer,
    /// Made when the first request has a guide.
    compiler: OnceLock<Result<GuideCompiler, GuideError>>,
}

impl From<Tokenizer> for Tokens {
    fn from(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, compiler: OnceLock::new() }
    }
}

impl TextModel {
    /// A matcher for the guide of a request, if it has one.
    ///
    /// # Errors
    /// [`LlmError::Sampling`] or [`LlmError::Guide`], or [`LlmError::NoTokenizer`].
    pub(super) fn compile_guide(
        &self,
        params: &SamplingParams,
    ) -> Result<Option<GuideMatcher>, LlmError> {
        let Some(guided) = &params.guided_decoding else { return Ok(None) };
        let guide = guided.guide()?;
        let tokens = self.tokens()?;
        let make = || GuideCompiler::new(&tokens.tokenizer, self.vocab);
        let compiler = tokens.compiler.get_or_init(make).as_ref().map_err(Clone::clone)?;
        Ok(Some(compiler.compile(&guide)?))
    }
}
