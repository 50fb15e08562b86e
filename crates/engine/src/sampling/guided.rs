//! Guided decoding: the guide of a request.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::SamplingError;

/// Most bytes of a guide; a JSON schema counts as compact JSON.
pub const MAX_GUIDE_BYTES: usize = 256 << 10;

/// Constrains the output to a JSON schema, a regular expression or a grammar. The fields are those of
/// TensorRT-LLM's `GuidedDecodingParams`; exactly one must be set. The implementation is llguidance
/// (<https://github.com/guidance-ai/llguidance>), whose documentation lists the supported keywords of JSON
/// Schema, regular expressions and grammars.
///
/// The whole output matches the guide, or is the beginning of a match if a length limit or a stop ends it
/// early. When the match is complete and cannot be extended, the sequence ends, even if `min_tokens` or
/// `bad` say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuidedDecodingParams {
    /// A JSON schema, as an object or as a string. Keywords that llguidance cannot enforce, such as
    /// `uniqueItems`, are refused, and so are references to other files. Unknown keywords are ignored, as
    /// JSON Schema prescribes.
    pub json: Option<Value>,
    /// A regular expression in the syntax of Rust's `regex` crate, without look-around. It has to match the
    /// whole output.
    pub regex: Option<String>,
    /// A context-free grammar in llguidance's variant of Lark, with the start rule `start`. (TensorRT-LLM
    /// takes GBNF.)
    pub grammar: Option<String>,
    /// Any JSON object.
    pub json_object: bool,
    /// Not supported: anything but null is refused.
    pub structural_tag: Option<Value>,
}

/// The guide of a request: the field that is set, with its value.
#[derive(Clone, PartialEq, Debug)]
pub enum Guide<'a> {
    /// `json`, as an object or a string.
    Json(&'a Value),
    /// `regex`.
    Regex(&'a str),
    /// `grammar`.
    Grammar(&'a str),
    /// `json_object`.
    JsonObject,
}

impl Guide<'_> {
    /// Name of the field in the request.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Json(_) => "guided_decoding.json",
            Self::Regex(_) => "guided_decoding.regex",
            Self::Grammar(_) => "guided_decoding.grammar",
            Self::JsonObject => "guided_decoding.json_object",
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Json(Value::String(text)) => text.len(),
            Self::Json(schema) => schema.to_string().len(),
            Self::Regex(text) | Self::Grammar(text) => text.len(),
            Self::JsonObject => 0,
        }
    }
}

impl GuidedDecodingParams {
    /// The guide, without compiling it: that needs a tokenizer.
    ///
    /// # Errors
    /// [`SamplingError::Guides`] unless exactly one field is set, [`SamplingError::NotSupported`]
    /// for `structural_tag`, and [`SamplingError::OutOfRange`] for a guide of more than
    /// [`MAX_GUIDE_BYTES`] or a schema that is neither an object nor a string.
    pub fn guide(&self) -> Result<Guide<'_>, SamplingError> {
        if let Some(tag) = &self.structural_tag {
            let (field, found) = ("guided_decoding.structural_tag", tag.to_string());
            let advice = "write the tags into a `grammar`";
            return Err(SamplingError::NotSupported { field, found, advice });
        }
        let set = [
            self.json.as_ref().map(Guide::Json),
            self.regex.as_deref().map(Guide::Regex),
            self.grammar.as_deref().map(Guide::Grammar),
            self.json_object.then_some(Guide::JsonObject),
        ];
        let set: Vec<Guide<'_>> = set.into_iter().flatten().collect();
        let [guide] = &set[..] else {
            return Err(SamplingError::Guides { found: set.iter().map(Guide::field).collect() });
        };
        if let Guide::Json(schema) = guide
            && !(schema.is_object() || schema.is_string())
        {
            return Err(out_of_range(guide, schema.to_string(), "a JSON schema", "give an object"));
        }
        let bytes = guide.bytes();
        if bytes > MAX_GUIDE_BYTES {
            let allowed = format!("at most {MAX_GUIDE_BYTES} bytes");
            return Err(out_of_range(guide, format!("{bytes} bytes long"), &allowed, "shorten it"));
        }
        Ok(guide.clone())
    }
}

fn out_of_range(
    guide: &Guide<'_>,
    found: String,
    allowed: &str,
    advice: &'static str,
) -> SamplingError {
    let (field, allowed) = (guide.field(), allowed.to_owned());
    SamplingError::OutOfRange { field, found, allowed, advice }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::SamplingParams;

    fn refusal(guided: &Value) -> String {
        let params: Result<SamplingParams, _> =
            serde_json::from_value(json!({"guided_decoding": guided}));
        match params {
            Ok(params) => params.validate().unwrap_err().to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn each_field_alone_is_a_guide() {
        let schema = json!({"type": "object"});
        let text = json!("{\"type\": \"object\"}");
        for (params, guide) in [
            (json!({"json": schema}), Guide::Json(&schema)),
            (json!({"json": text, "regex": null}), Guide::Json(&text)),
            (json!({"regex": "a+", "json_object": false}), Guide::Regex("a+")),
            (json!({"grammar": "start: \"a\""}), Guide::Grammar("start: \"a\"")),
            (json!({"json_object": true}), Guide::JsonObject),
        ] {
            let params: GuidedDecodingParams = serde_json::from_value(params).unwrap();
            assert_eq!(params.guide(), Ok(guide));
        }
    }

    #[test]
    fn no_guide_and_several_are_refused_with_their_names() {
        assert!(refusal(&json!({})).contains("sets none"));
        let several =
            refusal(&json!({"regex": "a", "json_object": true, "grammar": "start: \"a\""}));
        for field in ["guided_decoding.regex", "guided_decoding.json_object", "exactly one"] {
            assert!(several.contains(field), "{several}");
        }
    }

    #[test]
    fn invalid_guides_are_refused_by_name() {
        for (guided, named) in [
            (json!({"structural_tag": "{}"}), "`guided_decoding.structural_tag`"),
            (json!({"json": 3}), "`guided_decoding.json` is 3"),
            (json!({"json": [1]}), "`guided_decoding.json` is [1]"),
            (json!({"regex": 3}), "`guided_decoding.regex`"),
            (json!({"choice": ["a"]}), "unknown field `choice`"),
            (json!("a+"), "`guided_decoding`"),
        ] {
            let message = refusal(&guided);
            assert!(message.contains(named), "{named} is not in: {message}");
        }
    }

    #[test]
    fn the_size_of_a_guide_is_limited() {
        for field in ["regex", "grammar", "json"] {
            let message = refusal(&json!({ field: "a".repeat(MAX_GUIDE_BYTES + 1) }));
            assert!(message.contains(field) && message.contains("262144 bytes"), "{message}");
        }
        let longest = "a".repeat(MAX_GUIDE_BYTES);
        let fits = GuidedDecodingParams { regex: Some(longest), ..Default::default() };
        assert!(fits.guide().is_ok());
    }

    #[test]
    fn parameters_survive_serialisation() {
        let guided = GuidedDecodingParams { regex: Some("a+".to_owned()), ..Default::default() };
        let params = SamplingParams { guided_decoding: Some(guided), ..SamplingParams::default() };
        let written = serde_json::to_value(&params).unwrap();
        assert_eq!(serde_json::from_value::<SamplingParams>(written).unwrap(), params);
    }
}
