//! Validation of sampling parameters.

use std::fmt::Display;

use super::SamplingParams;

/// Largest value of `logprobs` and `prompt_logprobs`.
pub const MAX_LOGPROBS: usize = 128;

/// An invalid or unsupported sampling parameter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// A value outside its range.
    #[error("sampling parameter `{field}` is {found}, but must be {allowed}; {advice}")]
    OutOfRange {
        /// The parameter.
        field: &'static str,
        /// Its value.
        found: String,
        /// The range.
        allowed: String,
        /// What to set instead.
        advice: &'static str,
    },
    /// An empty string in `stop` or `bad`, which would match everywhere.
    #[error("sampling parameter `{field}` has an empty string at index {index}; remove it")]
    EmptyString {
        /// The parameter.
        field: &'static str,
        /// Index in the list, from 0.
        index: usize,
    },
    /// `best_of` is below `n`.
    #[error(
        "sampling parameter `best_of` is {best_of}, but must be at least `n`, which is {n}; \
         raise `best_of` or leave it out"
    )]
    BestOfBelowN {
        /// Sequences to generate.
        best_of: usize,
        /// Sequences to return.
        n: usize,
    },
    /// Several greedy sequences, which would all be equal.
    #[error(
        "sampling parameters `n` and `best_of` ask for {sequences} sequences of greedy sampling, \
         which would all be the same; set `temperature`, `top_p` or `top_k`, or ask for 1"
    )]
    GreedySequences {
        /// Sequences to generate.
        sequences: usize,
    },
    /// `min_tokens` is above `max_tokens`.
    #[error(
        "sampling parameter `min_tokens` is {min_tokens}, but must be at most `max_tokens`, which \
         is {max_tokens}; lower one or raise the other"
    )]
    MinTokensAboveMax {
        /// The minimum.
        min_tokens: usize,
        /// The maximum.
        max_tokens: usize,
    },
    /// `guided_decoding` without a guide, or with several.
    #[error(
        "sampling parameter `guided_decoding` sets {}, but must set exactly one of `json`, `regex`, \
         `grammar` and `json_object`; leave out `guided_decoding` for free text",
        if found.is_empty() { "none of its fields".to_owned() } else { found.join(" and ") }
    )]
    Guides {
        /// The fields that are set.
        found: Vec<&'static str>,
    },
    /// A parameter of TensorRT-LLM that this engine does not support.
    #[error("sampling parameter `{field}` is {found}, which is not supported; {advice}")]
    NotSupported {
        /// The parameter.
        field: &'static str,
        /// Its value as JSON.
        found: String,
        /// What to do instead.
        advice: &'static str,
    },
}

impl SamplingParams {
    /// Checks the ranges of all parameters, and their consistency. Token ids are not checked, as the vocabulary
    /// is not known here.
    ///
    /// # Errors
    /// The first [`SamplingError`], naming the parameter.
    pub fn validate(&self) -> Result<(), SamplingError> {
        self.validate_tokens()?;
        self.validate_sequences()?;
        self.validate_distribution()?;
        self.validate_penalties()?;
        self.validate_logprobs()?;
        self.guided_decoding.as_ref().map_or(Ok(()), |guided| guided.guide().map(drop))
    }

    fn validate_tokens(&self) -> Result<(), SamplingError> {
        for (field, id) in [("end_id", self.end_id), ("pad_id", self.pad_id)] {
            within(field, id, |id| id >= -1, "a token id or -1", "leave it out for the default")?;
        }
        for (field, words) in [("stop", &self.stop), ("bad", &self.bad)] {
            if let Some(index) = words.iter().position(String::is_empty) {
                return Err(SamplingError::EmptyString { field, index });
            }
        }
        let advice = "set null to generate up to `max_seq_len`";
        within("max_tokens", self.max_tokens, |max| max > 0, "at least 1", advice)?;
        let advice = "leave it out to keep the whole prompt";
        let kept = self.truncate_prompt_tokens;
        within("truncate_prompt_tokens", kept, |kept| kept > 0, "at least 1", advice)?;
        match (self.min_tokens, self.max_tokens) {
            (Some(min_tokens), Some(max_tokens)) if min_tokens > max_tokens => {
                Err(SamplingError::MinTokensAboveMax { min_tokens, max_tokens })
            }
            _ => Ok(()),
        }
    }

    fn validate_sequences(&self) -> Result<(), SamplingError> {
        within("n", Some(self.n), |n| n > 0, "at least 1", "set it to 1")?;
        match self.sequences() {
            best_of if best_of < self.n => Err(SamplingError::BestOfBelowN { best_of, n: self.n }),
            sequences if sequences > 1 && self.is_greedy() => {
                Err(SamplingError::GreedySequences { sequences })
            }
            _ => Ok(()),
        }
    }

    fn validate_distribution(&self) -> Result<(), SamplingError> {
        let finite = |t: f32| t.is_finite() && t >= 0.0;
        let advice = "set 0 for greedy sampling";
        within("temperature", self.temperature, finite, "finite and at least 0", advice)?;
        within("top_k", self.top_k, |k| k >= 0, "at least 0", "set 0 for all tokens")?;
        let probability = |p: f32| (0.0..=1.0).contains(&p);
        within("top_p", self.top_p, probability, "from 0 to 1", "set 1 for all tokens")?;
        within("min_p", self.min_p, probability, "from 0 to 1", "set 0 for all tokens")
    }

    fn validate_penalties(&self) -> Result<(), SamplingError> {
        let range = |bias: f32| (-100.0..=100.0).contains(&bias);
        for bias in self.logit_bias.values() {
            let advice = "use 100 to force a token and -100 to forbid it";
            within("logit_bias", Some(*bias), range, "from -100 to 100", advice)?;
        }
        let positive = |p: f32| p.is_finite() && p > 0.0;
        let (repetition, advice) = (self.repetition_penalty, "set 1 for no penalty");
        within("repetition_penalty", repetition, positive, "finite and above 0", advice)?;
        for (field, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            within(field, penalty, f32::is_finite, "finite", "set 0 for no penalty")?;
        }
        Ok(())
    }

    fn validate_logprobs(&self) -> Result<(), SamplingError> {
        let allowed = format!("at most {MAX_LOGPROBS}");
        for (field, count) in
            [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)]
        {
            let advice = "ask for fewer alternatives";
            within(field, count, |count| count <= MAX_LOGPROBS, &allowed, advice)?;
        }
        Ok(())
    }
}

/// Fails if a value is set and `fine` is false for it.
fn within<T: Copy + Display>(
    field: &'static str,
    value: Option<T>,
    fine: impl Fn(T) -> bool,
    allowed: &str,
    advice: &'static str,
) -> Result<(), SamplingError> {
    match value {
        Some(found) if !fine(found) => Err(SamplingError::OutOfRange {
            field,
            found: found.to_string(),
            allowed: allowed.to_owned(),
            advice,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(json: Value) -> SamplingParams {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn values_at_the_ends_of_their_ranges_are_valid() {
        for params in [
            json!({}),
            json!({"temperature": 0, "top_p": 0, "top_k": 0, "min_p": 0}),
            json!({"top_p": 1.0, "min_p": 1.0, "n": 2, "best_of": 3}),
            json!({"max_tokens": 4, "min_tokens": 4, "end_id": -1, "logprobs": MAX_LOGPROBS}),
            json!({"max_tokens": null, "min_tokens": 100, "truncate_prompt_tokens": 1}),
            json!({"repetition_penalty": 0.5, "presence_penalty": -3, "frequency_penalty": 9}),
        ] {
            assert_eq!(read(params.clone()).validate(), Ok(()), "{params}");
        }
    }

    #[test]
    fn values_outside_their_range_are_named() {
        for (field, value) in [
            ("end_id", json!(-2)),
            ("pad_id", json!(-2)),
            ("max_tokens", json!(0)),
            ("truncate_prompt_tokens", json!(0)),
            ("n", json!(0)),
            ("best_of", json!(0)),
            ("temperature", json!(-0.1)),
            ("temperature", json!(1e39)),
            ("top_k", json!(-1)),
            ("top_p", json!(1.1)),
            ("min_p", json!(-0.1)),
            ("repetition_penalty", json!(0)),
            ("presence_penalty", json!(-1e39)),
            ("frequency_penalty", json!(1e39)),
            ("logit_bias", json!({"3": 100.5})),
            ("logprobs", json!(MAX_LOGPROBS + 1)),
            ("prompt_logprobs", json!(MAX_LOGPROBS + 1)),
            ("stop", json!("")),
            ("bad", json!(["a", ""])),
            ("min_tokens", json!(33)),
        ] {
            let message = read(json!({ field: value })).validate().unwrap_err().to_string();
            assert!(message.contains(&format!("`{field}`")), "{message}");
        }
    }

    #[test]
    fn nan_and_infinities_are_refused() {
        for value in [f32::NAN, f32::INFINITY] {
            let params = SamplingParams { top_p: Some(value), ..SamplingParams::default() };
            assert!(params.validate().is_err());
            let params = SamplingParams { temperature: Some(value), ..SamplingParams::default() };
            assert!(params.validate().is_err());
        }
    }

    #[test]
    fn several_sequences_need_sampling() {
        let greedy = read(json!({"n": 2})).validate();
        assert_eq!(greedy, Err(SamplingError::GreedySequences { sequences: 2 }));
        assert_eq!(read(json!({"n": 2, "temperature": 0.8})).validate(), Ok(()));
        let fewer = read(json!({"n": 3, "best_of": 2, "temperature": 0.8})).validate();
        assert_eq!(fewer, Err(SamplingError::BestOfBelowN { best_of: 2, n: 3 }));
    }
}
