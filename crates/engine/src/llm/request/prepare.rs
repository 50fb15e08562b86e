//! From a request to the plans of its sequences: whatever can be refused is refused here, before
//! anything reaches the engine thread.

use std::sync::Arc;

use super::input::{GenerateRequest, Prompt};
use crate::adapters::Registered;
use crate::grammar::GuideMatcher;
use crate::llm::adapters::Adapters;
use crate::llm::{EngineInfo, LlmError, TextModel};
use crate::sampling::{SamplingParams, SamplingPlan};
use crate::text::{SpecialTokens, Tokenizer};

/// Bytes of a prompt that is cut to its last tokens, where more could not fit anyway: tokenizing so many
/// takes seconds and hundreds of megabytes.
const MAX_TRUNCATED_BYTES: usize = 4 << 20;

/// A request that passed every check.
pub(super) struct Prepared {
    /// Text of the prompt, unless ids were given.
    pub text: Option<String>,
    /// Tokenizer and end tokens: the model's, or the adapter's own.
    pub model_text: Arc<TextModel>,
    /// Tokens of the prompt.
    pub prompt: Vec<u32>,
    /// Prompt and answer together, at most.
    pub max_len: usize,
    /// One plan for each output.
    pub plans: Vec<Arc<SamplingPlan>>,
    /// What the text of each output must follow, at its start.
    pub guide: Option<GuideMatcher>,
    /// The adapter.
    pub adapter: Option<Arc<Registered>>,
    /// The request's parameters, for what happens to the text.
    pub params: SamplingParams,
}

/// Checks a request in every respect and tokenizes its prompt.
///
/// # Errors
/// Whatever refuses the request by itself.
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
        // Stop strings are looked for in text, so there has to be some.
        model_text.tokenizer()?;
    }
    let limits = Limits { info, params: &params };
    let (text, mut prompt) = limits.tokenize(&model_text, prompt)?;
    if let Some(keep) = params.truncate_prompt_tokens {
        prompt.drain(..prompt.len().saturating_sub(keep));
    }
    let max_len = limits.check_prompt(&prompt)?;
    let plans = limits.plans(&model_text)?;
    let guide = model_text.compile_guide(&params)?;
    Ok(Prepared { text, model_text, prompt, max_len, plans, guide, adapter, params })
}

/// A request's parameters against the engine's limits.
struct Limits<'a> {
    info: &'a EngineInfo,
    params: &'a SamplingParams,
}

impl Limits<'_> {
    /// Text, unless ids were given, and tokens of a prompt.
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

    /// Refuses a text that has too many tokens however it is tokenized, and one of which only the end is
    /// to be kept if it is too long to find out where that begins.
    fn check_bytes(&self, tokenizer: &Tokenizer, text: &str) -> Result<(), LlmError> {
        let (bytes, max_seq_len) = (text.len(), self.info.max_seq_len);
        let least =
            if self.params.truncate_prompt_tokens.is_some() { MAX_TRUNCATED_BYTES } else { 0 };
        // Of most texts it is clear without looking at the vocabulary.
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

    /// The length at which a sequence with this prompt ends at the latest.
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

    /// A plan for each output.
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
                // A tokenizer of its own may know tokens that the model does not have.
                let known =
                    |ids: &Vec<u32>| ids.iter().all(|id| (*id as usize) < self.info.model.vocab);
                plan.bad_sequences.retain(known);
                Ok(Arc::new(plan))
            })
            .collect()
    }
}
