//! Guides of requests, compiled against the model's tokenizer.

use std::sync::OnceLock;

use super::{Llm, LlmError};
use crate::grammar::{GuideCompiler, GuideError, GuideMatcher};
use crate::sampling::SamplingParams;

/// The compiler, made when the first request has a guide.
pub(super) type Guides = OnceLock<Result<GuideCompiler, GuideError>>;

impl Llm {
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
        let tokenizer = self.text.tokenizer()?;
        let make = || GuideCompiler::new(tokenizer, self.info.model.vocab);
        let compiler = self.guides.get_or_init(make).as_ref().map_err(Clone::clone)?;
        Ok(Some(compiler.compile(&guide)?))
    }
}
