//! Parameters of TensorRT-LLM that this engine does not support.
//!
//! Clients may send them in every request at the value that turns them off, which is accepted. Any other
//! value is refused, as ignoring it would change the output.

use serde_json::{Map, Value};

use super::SamplingError;

/// A value that turns a parameter off. Null always does.
enum Off {
    Bool(bool),
    Number(f64),
    Text(&'static str),
    EmptyList,
}

impl Off {
    fn is(&self, value: &Value) -> bool {
        match self {
            Self::Bool(off) => value.as_bool() == Some(*off),
            Self::Number(off) => value.as_f64() == Some(*off),
            Self::Text(off) => value.as_str() == Some(off),
            Self::EmptyList => value.as_array().is_some_and(Vec::is_empty),
        }
    }
}

/// A parameter of TensorRT-LLM that this engine does not support.
struct Unsupported {
    field: &'static str,
    /// Values that turn it off, besides null.
    off: &'static [Off],
    /// What to do instead.
    advice: &'static str,
}

const fn unsupported(
    field: &'static str,
    off: &'static [Off],
    advice: &'static str,
) -> Unsupported {
    Unsupported { field, off, advice }
}

/// The unsupported parameters. Length penalty and early stopping have an effect only in beam search, so several
/// of their values are harmless.
const UNSUPPORTED: &[Unsupported] = &[
    unsupported("use_beam_search", &[Off::Bool(false)], "use `best_of` with a temperature"),
    unsupported("beam_search_diversity_rate", &[Off::Number(0.0)], "leave it out"),
    unsupported("beam_width_array", &[Off::EmptyList], "leave it out"),
    unsupported("length_penalty", &[Off::Number(0.0), Off::Number(1.0)], "leave it out"),
    unsupported(
        "early_stopping",
        &[Off::Bool(false), Off::Number(0.0), Off::Number(1.0)],
        "leave it out",
    ),
    unsupported("embedding_bias", &[], "use `logit_bias`"),
    unsupported("logits_processor", &[], "leave it out"),
    unsupported("apply_batched_logits_processor", &[Off::Bool(false)], "leave it out"),
    unsupported("top_p_min", &[Off::Number(1e-6)], "use a fixed `top_p`"),
    unsupported("top_p_reset_ids", &[Off::Number(-1.0)], "use a fixed `top_p`"),
    unsupported("top_p_decay", &[Off::Number(1.0)], "use a fixed `top_p`"),
    unsupported("no_repeat_ngram_size", &[Off::Number(0.0)], "use `repetition_penalty`"),
    unsupported("logprobs_mode", &[Off::Text("RAW"), Off::Text("raw")], "use `RAW`"),
    unsupported("return_encoder_output", &[Off::Bool(false)], "leave it out"),
    unsupported("return_perf_metrics", &[Off::Bool(false)], "read the server's metrics"),
    unsupported("additional_model_outputs", &[Off::EmptyList], "leave it out"),
    unsupported("lookahead_config", &[], "leave it out"),
    unsupported("spaces_between_special_tokens", &[Off::Bool(true)], "leave it out"),
];

/// Removes the unsupported parameters from `fields`.
///
/// # Errors
/// [`SamplingError::NotSupported`] for the first one that is not turned off.
pub(super) fn refuse_unsupported(fields: &mut Map<String, Value>) -> Result<(), SamplingError> {
    for Unsupported { field, off, advice } in UNSUPPORTED {
        let Some(value) = fields.shift_remove(*field) else { continue };
        if !value.is_null() && !off.iter().any(|off| off.is(&value)) {
            let found = value.to_string();
            return Err(SamplingError::NotSupported { field, found, advice });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(field: &str, value: Value) -> Map<String, Value> {
        Map::from_iter([(field.to_owned(), value)])
    }

    #[test]
    fn every_one_is_accepted_when_null_and_refused_by_name_when_on() {
        for Unsupported { field, .. } in UNSUPPORTED {
            let mut null = fields(field, Value::Null);
            assert!(refuse_unsupported(&mut null).is_ok() && null.is_empty());
            let error = refuse_unsupported(&mut fields(field, json!({"x": 1}))).unwrap_err();
            assert!(error.to_string().contains(&format!("`{field}`")), "{error}");
        }
    }

    #[test]
    fn values_that_mean_off_are_accepted() {
        for (field, value) in [
            ("use_beam_search", json!(false)),
            ("early_stopping", json!(false)),
            ("length_penalty", json!(1.0)),
            ("top_p_reset_ids", json!(-1)),
            ("logprobs_mode", json!("RAW")),
            ("additional_model_outputs", json!([])),
        ] {
            assert!(refuse_unsupported(&mut fields(field, value)).is_ok(), "{field}");
        }
    }

    #[test]
    fn other_fields_are_left() {
        let mut other = fields("temperature", json!(1));
        refuse_unsupported(&mut other).unwrap();
        assert_eq!(other.len(), 1);
    }
}
