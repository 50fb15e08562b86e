//! Sampling parameters on the command line.

use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value};

use super::number::finite;

/// The flags, under the names that [`loramux_engine::SamplingParams`] has in JSON; those that are not
/// given do not appear there.
#[derive(Args, Serialize)]
#[command(next_help_heading = "Sampling")]
pub(super) struct SamplingArgs {
    /// Most tokens of an answer [default: 32]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<usize>,
    /// Divisor of the logits; without it, --top-k and --top-p sampling is greedy
    #[arg(long, value_name = "T", value_parser = finite::<f32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    /// Sample from the K most probable tokens; 0: from all
    #[arg(long, value_name = "K")]
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<i32>,
    /// Sample from the fewest tokens that together reach this probability
    #[arg(long, value_name = "P", value_parser = finite::<f32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f32>,
    /// Leave out tokens less probable than P times the most probable one
    #[arg(long, value_name = "P", value_parser = finite::<f32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    min_p: Option<f32>,
    /// Seed of the random numbers [default: a fresh one for each request, told in its answer]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    /// Text that ends an answer and is left out of it; repeatable
    #[arg(long, value_name = "TEXT")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stop: Vec<String>,
    /// Token that ends an answer and is left out of it; repeatable
    #[arg(long = "stop-token-id", value_name = "ID")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stop_token_ids: Vec<u32>,
    /// End and stop tokens cannot be drawn before this many tokens; stop strings are not held back
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    min_tokens: Option<usize>,
    /// Go on past the model's end token
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    ignore_eos: bool,
    /// Divides positive logits of tokens already present and multiplies negative ones
    #[arg(long, value_name = "X", value_parser = finite::<f32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens already present
    #[arg(long, value_name = "X", value_parser = finite::<f32>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    presence_penalty: Option<f32>,
    /// Subtracted from them once for each occurrence
    #[arg(long, value_name = "X", value_parser = finite::<f32>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    frequency_penalty: Option<f32>,
    /// Answers for each prompt
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    n: Option<usize>,
    /// Answers to generate, of which the N most probable are returned
    #[arg(long, value_name = "M")]
    #[serde(skip_serializing_if = "Option::is_none")]
    best_of: Option<usize>,
    /// Report log-probabilities of the answer: 0 of its tokens, K also of the K most probable
    #[arg(long, value_name = "K")]
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<usize>,
    /// The same for the tokens of the prompt
    #[arg(long, value_name = "K")]
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<usize>,
}

impl SamplingArgs {
    /// Whether something is asked for that only JSON lines can report.
    pub fn wants_logprobs(&self) -> bool {
        self.logprobs.is_some() || self.prompt_logprobs.is_some()
    }

    /// The flags that were given, as a JSON object.
    pub fn given(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(fields)) => fields,
            // The structure has named fields of plain types, so it is always an object.
            _ => Map::new(),
        }
    }
}
