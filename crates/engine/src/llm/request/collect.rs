//! Building an output from its tokens: detokenisation, stop strings, and truncation at a stop.

use super::output::{CompletionOutput, FinishReason, StopReason, logprobs_map};
use crate::core::EndReason;
use crate::sampling::SamplingParams;
use crate::sampling::TokenLogprobs;
use crate::text::{Detokenizer, StopStrings, TextError, Tokenizer};

/// An output while its tokens arrive.
pub(super) struct OutputBuilder {
    index: usize,
    detokenizer: Option<Detokenizer>,
    stops: StopStrings,
    /// Stop tokens, which end the output without being part of it.
    silent: Vec<u32>,
    wants_text: bool,
    wants_logprobs: bool,
    text: String,
    token_ids: Vec<u32>,
    /// Length of the detokenised text after each token, including stop strings.
    decoded_lens: Vec<usize>,
    decoded: usize,
    logprobs: Vec<TokenLogprobs>,
    logits: Vec<Vec<f32>>,
}

/// Result of adding a token to an output.
pub(super) struct PushResult {
    /// New text that can be shown.
    pub piece: String,
    /// Whether a stop string ended the output. The engine does not know stop strings, so the sequence has to
    /// be aborted.
    pub stopped: bool,
}

impl OutputBuilder {
    /// An output without tokens. Without a tokenizer its text stays empty.
    pub fn new(
        index: usize,
        params: &SamplingParams,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self, TextError> {
        Ok(Self {
            index,
            detokenizer: tokenizer
                .filter(|_| params.detokenize || !params.stop.is_empty())
                .map(|tokenizer| tokenizer.detokenizer(params.skip_special_tokens)),
            stops: StopStrings::new(&params.stop, params.include_stop_str_in_output)?,
            silent: if params.include_stop_str_in_output {
                Vec::new()
            } else {
                params.stop_token_ids.clone()
            },
            wants_text: params.detokenize,
            wants_logprobs: params.logprobs.is_some() || params.sequences() > params.n,
            text: String::new(),
            token_ids: Vec::new(),
            decoded_lens: Vec::new(),
            decoded: 0,
            logprobs: Vec::new(),
            logits: Vec::new(),
        })
    }

    /// Index among the request's outputs.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Number of tokens so far.
    pub fn len(&self) -> usize {
        self.token_ids.len()
    }

    /// Adds a token.
    pub fn push(
        &mut self,
        id: u32,
        logprobs: Option<TokenLogprobs>,
        logits: Option<Vec<f32>>,
    ) -> Result<PushResult, TextError> {
        self.token_ids.push(id);
        self.logprobs.extend(logprobs);
        self.logits.extend(logits);
        let piece = match &mut self.detokenizer {
            Some(detokenizer) if !self.silent.contains(&id) => detokenizer.push(id)?,
            _ => String::new(),
        };
        self.decoded += piece.len();
        self.decoded_lens.push(self.decoded);
        let event = self.stops.push(&piece);
        self.text.push_str(&event.text);
        let piece = if self.wants_text { event.text } else { String::new() };
        Ok(PushResult { piece, stopped: event.matched.is_some() })
    }

    /// Completes the output. Also returns the last piece of text, which had been held back.
    pub fn finish(mut self, reason: EndReason) -> Result<(CompletionOutput, String), TextError> {
        let (finish_reason, mut stop_reason) = match reason {
            EndReason::End => (FinishReason::Stop, None),
            EndReason::StopToken(id) => (FinishReason::Stop, Some(StopReason::Token(id))),
            EndReason::Length => (FinishReason::Length, None),
            EndReason::Cancelled => (FinishReason::Cancelled, None),
        };
        let piece = self.flush()?;
        let mut finish_reason = finish_reason;
        if let Some(stop) = self.stops.finish().matched {
            let shown = self.text.len();
            let keep = self.decoded_lens.iter().take_while(|len| **len <= shown).count();
            self.keep_tokens(keep);
            (finish_reason, stop_reason) = (FinishReason::Stop, Some(StopReason::Text(stop)));
        } else if matches!(stop_reason, Some(StopReason::Token(id)) if self.silent.contains(&id)) {
            self.keep_tokens(self.token_ids.len() - 1);
        }
        if !self.wants_text {
            self.text.clear();
        }
        Ok((self.into_output(finish_reason, stop_reason), piece))
    }

    /// Releases the text that the detokeniser and the stop search held back.
    fn flush(&mut self) -> Result<String, TextError> {
        let rest = match &mut self.detokenizer {
            Some(detokenizer) => detokenizer.finish()?,
            None => String::new(),
        };
        let mut piece = self.stops.push(&rest).text;
        piece.push_str(&self.stops.finish().text);
        self.text.push_str(&piece);
        Ok(piece)
    }

    fn keep_tokens(&mut self, keep: usize) {
        self.token_ids.truncate(keep);
        self.logprobs.truncate(keep);
        self.logits.truncate(keep);
    }

    fn into_output(
        self,
        finish_reason: FinishReason,
        stop_reason: Option<StopReason>,
    ) -> CompletionOutput {
        let sum = || self.logprobs.iter().map(|entry| entry.token.logprob).sum();
        let maps = || self.logprobs.iter().map(logprobs_map).collect();
        CompletionOutput {
            index: self.index,
            cumulative_logprob: self.wants_logprobs.then(sum),
            logprobs: self.wants_logprobs.then(maps),
            text: self.text,
            token_ids: self.token_ids,
            finish_reason,
            stop_reason,
            generation_logits: (!self.logits.is_empty()).then_some(self.logits),
        }
    }
}
