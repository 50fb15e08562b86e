//! Checks a request completely and turns it into sampling plans and tokens, before anything is submitted to
//! the engine thread.

use std::sync::Arc;

use super::input::{GenerateRequest, Prompt};
use crate::adapters::Registered;
use crate::grammar::GuideMatcher;
use crate::llm::adapters::Adapters;
use crate::llm::{EngineInfo, LlmError, TextModel};
use crate::sampling::{SamplingParams, SamplingPlan};
use crate::text::{SpecialTokens, Tokenizer};

/// Most bytes of a prompt that `truncate_prompt_tokens` cuts to its last tokens, if no more would fit
/// uncut. Tokenizing this many takes seconds and hundreds of megabytes.
const MAX_TRUNCATED_BYTES: usize = 4 << 20;

/// A request that passed every check.
pub(super) struct Prepared {
    /// Text of the prompt; `None` if ids were given.
    pub text: Option<String>,
    /// Tokenizer and end tokens of the model or of the adapter.
    pub model_text: Arc<TextModel>,
    /// Tokens of the prompt.
    pub prompt: Vec<u32>,
    /// Maximum length of prompt and generated tokens together.
    pub max_len: usize,
    /// Sampling plan of each output.
    pub plans: Vec<Arc<SamplingPlan>>,
    /// The guide of the outputs, in its initial state.
    pub guide: Option<GuideMatcher>,
    /// The adapter.
    pub adapter: Option<Arc<Registered>>,
    /// The request's sampling parameters.
    pub params: SamplingParams,
}

/// Checks a request and tokenizes its prompt.
///
/// # Errors
/// Why the request is refused.
pub(super) fn prepare(
    request: GenerateRequest,
    info: &EngineInfo,
    adapters: &Adapters,
) -> Result<Prepared, LlmError> {
    let GenerateRequest { prompt, sampling: params, lora } = request;
    params.validate()?;
    let adapter = lora.as_ref().map(|lora| adapters.resolve(lora)).transpose()?;
    let model_text = adapters.text_of(adapter.as_ref())?;
    if !params.stop.is_empty() {
        // Stop strings are searched in the text, which needs a tokenizer.
        model_text.tokenizer()?;
    }
    let limits = RequestLimits { info, params: &params };
    let (text, mut prompt) = limits.tokenize(&model_text, prompt)?;
    if let Some(keep) = params.truncate_prompt_tokens {
        prompt.drain(..prompt.len().saturating_sub(keep));
    }
    let max_len = limits.check_prompt(&prompt)?;
    let plans = limits.plans(&model_text)?;
    let guide = model_text.compile_guide(&params)?;
    Ok(Prepared { text, model_text, prompt, max_len, plans, guide, adapter, params })
}

/// Checks a request's parameters against the engine's limits.
struct RequestLimits<'a> {
    info: &'a EngineInfo,
    params: &'a SamplingParams,
}

impl RequestLimits<'_> {
    /// The text of a prompt, unless ids were given, and its tokens.
    fn tokenize(
        &self,
        model: &TextModel,
        prompt: Prompt,
    ) -> Result<(Option<String>, Vec<u32>), LlmError> {
        let special =
            if self.params.add_special_tokens { SpecialTokens::Add } else { SpecialTokens::Skip };
        let (text, special) = match prompt {
            Prompt::Ids(ids) => return Ok((None, ids)),
            Prompt::Text(text) => (text, special),
            Prompt::Chat(messages) => (model.render_chat(&messages)?, SpecialTokens::Skip),
        };
        let tokenizer = model.tokenizer()?;
        self.check_bytes(tokenizer, &text)?;
        let ids = tokenizer.encode(&text, special)?;
        Ok((Some(text), ids))
    }

    /// Refuses a text that is too long to be tokenized: by its length it cannot fit `max_seq_len`, or, with
    /// `truncate_prompt_tokens`, it exceeds [`MAX_TRUNCATED_BYTES`] as well.
    fn check_bytes(&self, tokenizer: &Tokenizer, text: &str) -> Result<(), LlmError> {
        let (bytes, max_seq_len) = (text.len(), self.info.max_seq_len);
        let least =
            if self.params.truncate_prompt_tokens.is_some() { MAX_TRUNCATED_BYTES } else { 0 };
        // The limit is at least this, so most texts pass without a look at the vocabulary.
        if bytes < max_seq_len.max(least) {
            return Ok(());
        }
        let fits = (max_seq_len - 1).saturating_mul(tokenizer.bytes_per_token());
        let limit = fits.max(least);
        if bytes > limit {
            return Err(LlmError::PromptTooLarge { bytes, limit, max_seq_len });
        }
        Ok(())
    }

    /// Checks a prompt's length and all token ids. Returns the maximum length of its sequences.
    fn check_prompt(&self, prompt: &[u32]) -> Result<usize, LlmError> {
        let params = self.params;
        let (found, max_seq_len) = (prompt.len(), self.info.max_seq_len);
        if found == 0 {
            return Err(LlmError::EmptyPrompt);
        }
        if found >= max_seq_len {
            return Err(LlmError::PromptTooLong { found, max_seq_len });
        }
        let vocab = self.info.model.vocab;
        if let Some(index) = prompt.iter().position(|id| *id as usize >= vocab) {
            return Err(LlmError::TokenId { index, found: prompt[index], vocab });
        }
        let end_id = params.end_id.and_then(|id| u32::try_from(id).ok());
        let biased: Vec<u32> = params.logit_bias.keys().copied().collect();
        for (what, ids) in [
            ("bad_token_ids", &params.bad_token_ids[..]),
            ("logit_bias", &biased),
            ("stop_token_ids", &params.stop_token_ids),
            ("end_id", end_id.as_slice()),
        ] {
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
                return Err(LlmError::parameter(what, id, format!("ids 0 to {}", vocab - 1)));
            }
        }
        let room = max_seq_len - found;
        let asked = params.max_tokens.unwrap_or(room);
        if params.max_tokens.is_some() && asked > room {
            tracing::warn!("max_tokens {asked} is cut to {room}, as max_seq_len is {max_seq_len}");
        }
        Ok(found + asked.min(room))
    }

    /// The sampling plan of each output.
    fn plans(&self, text: &TextModel) -> Result<Vec<Arc<SamplingPlan>>, LlmError> {
        let params = self.params;
        let outputs = params.sequences();
        let most = self.info.max_batch_size;
        if outputs > most {
            return Err(LlmError::parameter("n", outputs, format!("1 to max_batch_size ({most})")));
        }
        (0..outputs as u32)
            .map(|stream| {
                let mut plan = SamplingPlan::resolve(params, text.end_ids(), stream);
                if !params.bad.is_empty() {
                    plan.ban_words(&params.bad, text.tokenizer()?)?;
                }
                // An adapter's tokenizer may have tokens that the model has not. Those cannot be sampled.
                let known =
                    |ids: &Vec<u32>| ids.iter().all(|id| (*id as usize) < self.info.model.vocab);
                plan.bad_sequences.retain(known);
                Ok(Arc::new(plan))
            })
            .collect()
    }
}
