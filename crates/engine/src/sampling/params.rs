//! [`SamplingParams`]: the sampling parameters of a request.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use serde_path_to_error::Track;

use super::unsupported::refuse_unsupported;
use super::{GuidedDecodingParams, Object};

/// Sampling parameters of one request, with TensorRT-LLM's names and defaults.
///
/// Deserialisation is strict: unknown fields are refused, and parameters of TensorRT-LLM that this engine does
/// not support (beam search and others) are accepted only at the value that turns them off. Ranges are
/// checked by [`SamplingParams::validate`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", default, deny_unknown_fields)]
pub struct SamplingParams {
    /// End token. None: the model's end tokens; -1: no end token.
    pub end_id: Option<i32>,
    /// Padding token. None: `end_id`. Only validated, as batches are not padded with tokens.
    pub pad_id: Option<i32>,
    /// Most tokens to generate. None: up to `max_seq_len`.
    pub max_tokens: Option<usize>,
    /// Words that are never generated: a string or a list.
    #[serde(deserialize_with = "one_or_many")]
    pub bad: Vec<String>,
    /// Token ids that are never generated.
    #[serde(deserialize_with = "list_or_null")]
    pub bad_token_ids: Vec<u32>,
    /// Added to the logits of these token ids before penalties, from -100 to 100. As in OpenAI's API, the ids
    /// are strings in JSON.
    #[serde(deserialize_with = "map_or_null")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// Strings that end the sequence: a string or a list.
    #[serde(deserialize_with = "one_or_many")]
    pub stop: Vec<String>,
    /// Token ids that end the sequence.
    #[serde(deserialize_with = "list_or_null")]
    pub stop_token_ids: Vec<u32>,
    /// Whether the stop string or stop token that ended the sequence is part of the output.
    pub include_stop_str_in_output: bool,
    /// Number of sequences returned.
    pub n: usize,
    /// Number of sequences generated, of which the `n` with the highest cumulative
    /// log-probability are returned. None: `n`.
    pub best_of: Option<usize>,
    /// Sample from the `top_k` most probable tokens. None or 0: from all.
    pub top_k: Option<i32>,
    /// Sample from the fewest most probable tokens that together reach this probability.
    /// None: 1, all tokens.
    pub top_p: Option<f32>,
    /// Leave out tokens less probable than `min_p` times the most probable one. None: 0.
    pub min_p: Option<f32>,
    /// Seed of the random numbers. None: 0.
    pub seed: Option<u64>,
    /// Divisor of the logits. None: 1.
    pub temperature: Option<f32>,
    /// Fewest tokens before an end or stop token may be sampled. None: 1.
    pub min_tokens: Option<usize>,
    /// Continue past end tokens, up to another limit.
    pub ignore_eos: bool,
    /// Positive logits of tokens already present are divided by it, negative ones multiplied.
    /// None: 1, off.
    pub repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens already present. None: 0.
    pub presence_penalty: Option<f32>,
    /// Subtracted from the logits of tokens already present, once for each occurrence. None: 0.
    pub frequency_penalty: Option<f32>,
    /// Number of leading prompt tokens that the penalties ignore. None: 0.
    pub prompt_ignore_length: Option<usize>,
    /// Log-probabilities of generated tokens: 0 for the token sampled, k for the k most probable
    /// besides. None: none.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// Return the logits of the prompt.
    pub return_context_logits: bool,
    /// Return the logits of the generated tokens.
    pub return_generation_logits: bool,
    /// Leave the prompt out of the output.
    pub exclude_input_from_output: bool,
    /// Return text besides token ids.
    pub detokenize: bool,
    /// Let the tokenizer add its special tokens, such as BOS, to the prompt.
    pub add_special_tokens: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Keep only this many tokens from the end of the prompt. None: all.
    pub truncate_prompt_tokens: Option<usize>,
    /// Guided decoding. None: free text.
    #[serde(deserialize_with = "guide_or_null")]
    pub guided_decoding: Option<GuidedDecodingParams>,
}

impl Default for SamplingParams {
    /// One greedy sequence of up to 32 tokens.
    fn default() -> Self {
        Self {
            end_id: None,
            pad_id: None,
            max_tokens: Some(32),
            bad: Vec::new(),
            bad_token_ids: Vec::new(),
            logit_bias: BTreeMap::new(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            n: 1,
            best_of: None,
            top_k: None,
            top_p: None,
            min_p: None,
            seed: None,
            temperature: None,
            min_tokens: None,
            ignore_eos: false,
            repetition_penalty: None,
            presence_penalty: None,
            frequency_penalty: None,
            prompt_ignore_length: None,
            logprobs: None,
            prompt_logprobs: None,
            return_context_logits: false,
            return_generation_logits: false,
            exclude_input_from_output: true,
            detokenize: true,
            add_special_tokens: true,
            skip_special_tokens: true,
            truncate_prompt_tokens: None,
            guided_decoding: None,
        }
    }
}

impl SamplingParams {
    /// Whether sampling is greedy: none of `temperature`, `top_p` and `top_k` is set, or one of them leaves a
    /// single token (`top_k` 1, `top_p` 0, `temperature` 0).
    pub fn is_greedy(&self) -> bool {
        let unset = self.temperature.is_none() && self.top_p.is_none() && self.top_k.is_none();
        unset || self.top_k == Some(1) || self.top_p == Some(0.0) || self.temperature == Some(0.0)
    }

    /// Number of sequences to generate: `best_of`, or `n` if that is not set.
    pub fn sequences(&self) -> usize {
        self.best_of.unwrap_or(self.n)
    }
}

impl Serialize for SamplingParams {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Not a recursion: `remote` makes the derived code an inherent function of this name.
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for SamplingParams {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut fields = Map::deserialize(deserializer)?;
        refuse_unsupported(&mut fields).map_err(serde::de::Error::custom)?;
        let mut track = Track::new();
        let fields = serde_path_to_error::Deserializer::new(Value::Object(fields), &mut track);
        Self::deserialize(fields).map_err(|error| {
            serde::de::Error::custom(format!("sampling parameter `{}`: {error}", track.path()))
        })
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Ok(match Option::deserialize(deserializer)? {
        None => Vec::new(),
        Some(OneOrMany::One(text)) => vec![text],
        Some(OneOrMany::Many(texts)) => texts,
    })
}

fn map_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u32, f32>, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

fn guide_or_null<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<GuidedDecodingParams>, D::Error> {
    let guide: Option<Object<GuidedDecodingParams>> = Option::deserialize(deserializer)?;
    Ok(guide.map(|Object(guide)| guide))
}

fn list_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(json: Value) -> Result<SamplingParams, String> {
        serde_json::from_value(json).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_object_gives_the_defaults() {
        assert_eq!(read(json!({})).unwrap(), SamplingParams::default());
        assert_eq!(SamplingParams::default().max_tokens, Some(32));
    }

    #[test]
    fn null_means_not_set() {
        let params = read(json!({"max_tokens": null, "stop": null, "bad_token_ids": null}));
        let expected = SamplingParams { max_tokens: None, ..SamplingParams::default() };
        assert_eq!(params.unwrap(), expected);
    }

    #[test]
    fn stop_and_bad_are_a_string_or_a_list() {
        let params = read(json!({"stop": "a", "bad": ["b", "c"]})).unwrap();
        assert_eq!((params.stop, params.bad), (vec!["a".into()], vec!["b".into(), "c".into()]));
        let error = read(json!({"stop": 3})).unwrap_err();
        assert!(error.contains("`stop`") && error.contains("a list of strings"), "{error}");
    }

    #[test]
    fn a_guide_is_an_object_and_not_a_list_of_its_values() {
        let error = read(json!({"guided_decoding": [null, "a+"]})).unwrap_err();
        assert!(error.contains("`guided_decoding`"), "{error}");
    }

    #[test]
    fn ids_of_a_bias_are_strings_as_in_openai_s_json() {
        let params = read(json!({"logit_bias": {"50256": -100, "7": 0.5}})).unwrap();
        assert_eq!(params.logit_bias, BTreeMap::from([(7, 0.5), (50256, -100.0)]));
        assert!(read(json!({"logit_bias": null})).unwrap().logit_bias.is_empty());
        let error = read(json!({"logit_bias": {"x": 1}})).unwrap_err();
        assert!(error.contains("`logit_bias"), "{error}");
    }

    #[test]
    fn parameters_survive_serialisation() {
        let params = SamplingParams {
            logit_bias: BTreeMap::from([(3, -1.5)]),
            temperature: Some(0.7),
            stop: vec!["x".to_owned()],
            end_id: Some(-1),
            seed: Some(u64::MAX),
            ..SamplingParams::default()
        };
        assert_eq!(read(serde_json::to_value(&params).unwrap()).unwrap(), params);
    }

    #[test]
    fn unknown_fields_and_wrong_types_are_named() {
        let unknown = read(json!({"tempreature": 1.0})).unwrap_err();
        assert!(unknown.contains("unknown field `tempreature`"), "{unknown}");
        let wrong = read(json!({"top_p": "high"})).unwrap_err();
        assert!(wrong.contains("`top_p`") && wrong.contains("\"high\""), "{wrong}");
    }

    #[test]
    fn parameters_that_are_not_supported_are_refused_unless_off() {
        let off = json!({"use_beam_search": false, "guided_decoding": null, "length_penalty": 1});
        assert_eq!(read(off).unwrap(), SamplingParams::default());
        let error = read(json!({"use_beam_search": true})).unwrap_err();
        assert!(error.contains("`use_beam_search` is true") && error.contains("not supported"));
    }

    #[test]
    fn greedy_is_all_unset_or_a_single_candidate() {
        let greedy = |json| read(json).unwrap().is_greedy();
        for params in [
            json!({}),
            json!({"min_p": 0.1, "seed": 4}),
            json!({"top_k": 1, "temperature": 0.9}),
            json!({"top_p": 0.0, "temperature": 0.9}),
            json!({"temperature": 0, "top_k": 40}),
        ] {
            assert!(greedy(params.clone()), "{params}");
        }
        for params in [json!({"temperature": 1}), json!({"top_k": 0}), json!({"top_p": 1})] {
            assert!(!greedy(params.clone()), "{params}");
        }
    }
}
