//! Outputs of requests, under TensorRT-LLM's names.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::sampling::TokenLogprobs;

/// Why an output ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// An end token, stop token or stop string.
    Stop,
    /// The maximum length.
    Length,
    /// The request was aborted.
    Cancelled,
}

/// The stop token or stop string that ended an output, if it was not an end token.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(untagged)]
pub enum StopReason {
    /// A stop token.
    Token(u32),
    /// A stop string.
    Text(String),
}

/// Log-probability and rank of a token at one position.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Logprob {
    /// Natural logarithm of its probability, before penalties and temperature.
    pub logprob: f32,
    /// Rank by probability; 1 is the most probable token.
    pub rank: u32,
}

/// The tokens reported at one position, by id.
pub type Logprobs = BTreeMap<u32, Logprob>;

impl From<&TokenLogprobs> for Logprob {
    fn from(entry: &TokenLogprobs) -> Self {
        Self { logprob: entry.token.logprob, rank: entry.token.rank }
    }
}

/// The map of a position: its token and the most probable ones.
pub fn logprobs_map(entry: &TokenLogprobs) -> Logprobs {
    let top = entry.top.iter().map(|t| (t.id, Logprob { logprob: t.logprob, rank: t.rank }));
    top.chain([(entry.token.id, entry.into())]).collect()
}

/// One continuation of a prompt.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct CompletionOutput {
    /// Index among the request's outputs.
    pub index: usize,
    /// Text, empty where `detokenize` is off.
    pub text: String,
    /// Tokens, including an end token, but without stop tokens and stop strings (unless
    /// `include_stop_str_in_output` is set).
    pub token_ids: Vec<u32>,
    /// Sum of the log-probabilities of the tokens; `None` unless log-probabilities were asked for.
    pub cumulative_logprob: Option<f32>,
    /// One map for each token.
    pub logprobs: Option<Vec<Logprobs>>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The stop token or stop string that ended it.
    pub stop_reason: Option<StopReason>,
    /// Logits of each generated token, `[vocab]`, if asked for.
    #[serde(skip)]
    pub generation_logits: Option<Vec<Vec<f32>>>,
}

/// What one output of a request has gained since its last delta.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Delta {
    /// Index of the output among the request's.
    pub output: usize,
    /// New text, possibly empty. Text that may become part of a stop string is held back.
    pub text: String,
    /// New tokens as they were sampled, including those of a stop string, which the complete output leaves
    /// out.
    pub token_ids: Vec<u32>,
    /// One map for each new token, if asked for.
    pub logprobs: Vec<Logprobs>,
    /// Tokens of the output so far.
    pub tokens: usize,
    /// Why the output ended, in its last delta.
    pub finish_reason: Option<FinishReason>,
    /// The stop token or stop string that ended it.
    pub stop_reason: Option<StopReason>,
}

impl Delta {
    /// Appends a later delta.
    pub(in crate::llm) fn absorb(&mut self, later: Option<Self>) {
        if let Some(later) = later {
            self.text.push_str(&later.text);
            self.token_ids.extend(later.token_ids);
            self.logprobs.extend(later.logprobs);
            self.tokens = later.tokens;
            (self.finish_reason, self.stop_reason) = (later.finish_reason, later.stop_reason);
        }
    }
}

/// The result of one request.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct RequestOutput {
    /// Id of the request, unique in its engine.
    pub request_id: u64,
    /// The prompt's text; `None` if ids were given.
    pub prompt: Option<String>,
    /// The prompt's tokens.
    pub prompt_token_ids: Vec<u32>,
    /// The `n` outputs.
    pub outputs: Vec<CompletionOutput>,
    /// For each prompt token, the distribution that predicted it; the first is `None`.
    pub prompt_logprobs: Option<Vec<Option<Logprobs>>>,
    /// Logits of each prompt token, `[vocab]`, if asked for.
    #[serde(skip)]
    pub context_logits: Option<Vec<Vec<f32>>>,
}

/// Progress of an output, for callers that show text while it is generated.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// Position of the request in the call, or its number in its batch.
    pub request: usize,
    /// Index of the output among the request's.
    pub output: usize,
    /// Text since the last update; may be empty.
    pub piece: &'a str,
    /// Tokens generated so far.
    pub tokens: usize,
    /// Whether the output is complete.
    pub finished: bool,
}
