//! Sampling flags.

use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value};

use super::number::finite;

/// The sampling flags. They serialise under the names of [`loramux_engine::SamplingParams`]; flags that are not given
/// are left out, so that requests and defaults can fill them in.
#[derive(Args, Serialize)]
#[command(next_help_heading = "Sampling")]
pub(super) struct SamplingArgs {
    /// Maximum tokens of an answer [default: 32]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<usize>,
    /// Sampling temperature; without it, --top-k and --top-p, decoding is greedy
    #[arg(long, value_name = "T", value_parser = finite::<f32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    /// Sample from the K most probable tokens; 0: from all
    #[arg(long, value_name = "K")]
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<i32>,
    /// Sample from the smallest set of tokens whose probabilities add up to at least P
    #[arg(long, value_name = "P", value_parser = finite::<f32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f32>,
    /// Exclude tokens less probable than P times the most probable one
    #[arg(long, value_name = "P", value_parser = finite::<f32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    min_p: Option<f32>,
    /// Seed of the random numbers [default: a new one for each request, reported in its answer]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    /// Stop string: ends an answer and is left out of it; repeatable
    #[arg(long, value_name = "TEXT")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stop: Vec<String>,
    /// Stop token: ends an answer and is left out of it; repeatable
    #[arg(long = "stop-token-id", value_name = "ID")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stop_token_ids: Vec<u32>,
    /// Do not sample end and stop tokens before N tokens; stop strings still end an answer
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    min_tokens: Option<usize>,
    /// Continue past the model's end token
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    ignore_eos: bool,
    /// Divide positive logits of tokens already present by X, and multiply negative ones
    #[arg(long, value_name = "X", value_parser = finite::<f32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    repetition_penalty: Option<f32>,
    /// Subtract X from the logits of tokens already present
    #[arg(long, value_name = "X", value_parser = finite::<f32>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    presence_penalty: Option<f32>,
    /// Subtract X from the logits of tokens already present, once for each occurrence
    #[arg(long, value_name = "X", value_parser = finite::<f32>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    frequency_penalty: Option<f32>,
    /// Answers for each prompt
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    n: Option<usize>,
    /// Answers to generate for each prompt, of which the most probable --n are returned
    #[arg(long, value_name = "M")]
    #[serde(skip_serializing_if = "Option::is_none")]
    best_of: Option<usize>,
    /// Report log-probabilities of the answer's tokens, and of the K most probable at each position
    #[arg(long, value_name = "K")]
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<usize>,
    /// As --logprobs, for the tokens of the prompt
    #[arg(long, value_name = "K")]
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<usize>,
}

impl SamplingArgs {
    /// Whether log-probabilities are requested, which only JSON lines can report.
    pub fn wants_logprobs(&self) -> bool {
        self.logprobs.is_some() || self.prompt_logprobs.is_some()
    }

    /// The flags that were given, as a JSON object.
    pub fn given(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(fields)) => fields,
            // A struct with named fields of plain types always serialises to an object.
            _ => Map::new(),
        }
    }
}
