//! Requests in OpenAI's batch format: the body of a chat or text completion in an envelope.

use loramux_engine::Prompt;
use serde::Deserialize;
use serde_json::{Map, Value, json, value::RawValue};

use super::messages::{Messages, chat};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A line.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BatchLine {
    /// Already read by [`super::Identity`].
    #[serde(default, rename = "custom_id")]
    _custom_id: Option<Box<RawValue>>,
    method: Option<String>,
    url: Option<String>,
    body: Map<String, Value>,
}

/// The request of a line, with the adapter still unresolved.
pub(super) struct Asked {
    pub prompt: Prompt,
    /// Name of the base model or of an adapter.
    pub model: Option<String>,
    /// Sampling parameters under this program's names.
    pub sampling: Map<String, Value>,
}

/// Fields that have no effect on the generated text, so any value is accepted.
const WITHOUT_EFFECT: &[&str] = &[
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "stream_options",
];

/// Fields that have the meaning of the sampling parameter of the same name.
const SAME_NAME: &[&str] = &[
    "temperature",
    "top_p",
    "n",
    "stop",
    "seed",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "best_of",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
];

impl BatchLine {
    /// Converts the line to this program's parameters.
    ///
    /// # Errors
    /// A message with the first unsupported field.
    pub fn read(self) -> Result<Asked, String> {
        let mut body = self.body;
        if let Some(method) = self.method.filter(|method| method != "POST") {
            return Err(format!("method is {method:?}, but must be \"POST\""));
        }
        let is_chat = match self.url.as_deref() {
            None => body.contains_key("messages"),
            Some(CHAT) => true,
            Some(TEXT) => false,
            Some(url) => return Err(format!("url is {url:?}, but must be {CHAT:?} or {TEXT:?}")),
        };
        let prompt = prompt(&mut body, is_chat)?;
        let model = match body.shift_remove("model") {
            None | Some(Value::Null) => None,
            Some(Value::String(model)) => Some(model),
            Some(other) => return Err(format!("body.model is {other}, but must be a string")),
        };
        let mut sampling = Map::new();
        for field in SAME_NAME {
            if let Some(value) = body.shift_remove(*field).filter(|value| !value.is_null()) {
                sampling.insert((*field).to_owned(), value);
            }
        }
        put(&mut sampling, "max_tokens", max_tokens(&mut body)?);
        put(&mut sampling, "logprobs", logprobs(&mut body, is_chat)?);
        put(&mut sampling, "guided_decoding", guide(&mut body)?);
        refuse_others(body)?;
        Ok(Asked { prompt, model, sampling })
    }
}

fn put(sampling: &mut Map<String, Value>, field: &str, value: Option<Value>) {
    if let Some(value) = value {
        sampling.insert(field.to_owned(), value);
    }
}

fn prompt(body: &mut Map<String, Value>, is_chat: bool) -> Result<Prompt, String> {
    let field = if is_chat { "messages" } else { "prompt" };
    let value = body.shift_remove(field).ok_or_else(|| format!("body.{field} is missing"))?;
    if is_chat {
        let messages: Messages =
            serde_json::from_value(value).map_err(|error| format!("body.messages: {error}"))?;
        return Ok(Prompt::Chat(chat(messages)));
    }
    let problem = "body.prompt must be a text or a list of token ids; several prompts go in several \
                   lines";
    match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(mut list) => match (list.pop(), list.is_empty()) {
            (Some(Value::String(text)), true) => Ok(Prompt::Text(text)),
            (Some(last), _) => {
                list.push(last);
                let ids = serde_json::from_value(Value::Array(list));
                ids.map(Prompt::Ids).map_err(|_| problem.to_owned())
            }
            (None, _) => Ok(Prompt::Ids(Vec::new())),
        },
        _ => Err(problem.to_owned()),
    }
}

/// The token limit, by either of OpenAI's names for it.
fn max_tokens(body: &mut Map<String, Value>) -> Result<Option<Value>, String> {
    let mut take = |field| body.shift_remove(field).filter(|value: &Value| !value.is_null());
    match (take("max_tokens"), take("max_completion_tokens")) {
        (Some(old), Some(new)) if old != new => Err(format!(
            "body.max_tokens is {old} and body.max_completion_tokens is {new}; give one of them"
        )),
        (old, new) => Ok(new.or(old)),
    }
}

/// The number of alternatives to report: `logprobs` and `top_logprobs` in chats, `logprobs` alone in text completions.
fn logprobs(body: &mut Map<String, Value>, is_chat: bool) -> Result<Option<Value>, String> {
    let mut take = |field| body.shift_remove(field).filter(|value: &Value| !value.is_null());
    let (logprobs, top) = (take("logprobs"), take("top_logprobs"));
    match (logprobs, top) {
        (logprobs, None) if !is_chat => Ok(logprobs),
        (Some(Value::Bool(true)), top) if is_chat => Ok(Some(top.unwrap_or(json!(0)))),
        (None | Some(Value::Bool(false)), None) => Ok(None),
        (Some(other), None) => Err(format!("body.logprobs is {other}, but must be a boolean")),
        (_, Some(top)) => Err(format!("body.top_logprobs is {top}, but body.logprobs is not true")),
    }
}

/// Converts `response_format` to guided decoding.
fn guide(body: &mut Map<String, Value>) -> Result<Option<Value>, String> {
    let Some(format) = body.shift_remove("response_format").filter(|format| !format.is_null())
    else {
        return Ok(None);
    };
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json!({"json_object": true}))),
        Some("json_schema") if format["json_schema"]["schema"].is_object() => {
            Ok(Some(json!({"json": format["json_schema"]["schema"]})))
        }
        _ => Err(format!("body.response_format is {format}, which is not supported")),
    }
}

/// Refuses the remaining fields, unless their value has no effect.
fn refuse_others(body: Map<String, Value>) -> Result<(), String> {
    for (field, value) in body {
        let off = match field.as_str() {
            "stream" | "echo" => value == json!(false),
            "tools" | "functions" => value == json!([]),
            "tool_choice" | "function_call" => value == json!("none"),
            "modalities" => value == json!(["text"]),
            "suffix" => value == json!(""),
            field => WITHOUT_EFFECT.contains(&field),
        };
        let absent = value.is_null() && OPTIONAL.contains(&field.as_str());
        if !off && !absent {
            return Err(format!("body.{field} is {value}, which is not supported; leave it out"));
        }
    }
    Ok(())
}

/// Unsupported fields that may be null, which means unused.
const OPTIONAL: &[&str] = &[
    "stream",
    "echo",
    "tools",
    "functions",
    "tool_choice",
    "function_call",
    "modalities",
    "suffix",
    "audio",
    "prediction",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &Value) -> Result<Asked, String> {
        let line = json!({"custom_id": "a", "method": "POST", "body": body});
        serde_json::from_str::<BatchLine>(&line.to_string()).unwrap().read()
    }

    #[test]
    fn a_chat_becomes_our_parameters() {
        let asked = read(&json!({
            "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "max_completion_tokens": 5, "temperature": 0.5, "logit_bias": {"7": -100}, "n": 1,
            "logprobs": true, "top_logprobs": 2, "response_format": {"type": "json_object"},
            "user": "u", "stream": false, "tools": null,
        }))
        .unwrap();
        assert!(matches!(&asked.prompt, Prompt::Chat(messages) if messages[0].content == "x"));
        assert_eq!(asked.model.as_deref(), Some("m"));
        let expected = json!({"temperature": 0.5, "n": 1, "logit_bias": {"7": -100},
            "max_tokens": 5, "logprobs": 2, "guided_decoding": {"json_object": true}});
        assert_eq!(Value::Object(asked.sampling), expected);
    }

    #[test]
    fn a_prompt_is_a_text_or_token_ids() {
        for (prompt, expected) in [
            (json!("x"), Prompt::Text("x".to_owned())),
            (json!(["x"]), Prompt::Text("x".to_owned())),
            (json!([1, 2]), Prompt::Ids(vec![1, 2])),
        ] {
            let asked = read(&json!({"prompt": prompt, "logprobs": 3})).unwrap();
            assert_eq!((asked.prompt, &asked.sampling["logprobs"]), (expected, &json!(3)));
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        let with = |field: &str, value: Value| {
            let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
            body[field] = value;
            read(&body).err().unwrap_or_default()
        };
        for (field, value) in [
            ("tools", json!([{"type": "function"}])),
            ("stream", json!(true)),
            ("response_format", json!({"type": "grammar"})),
            ("top_logprobs", json!(3)),
            ("logprobs", json!(3)),
            ("audio", json!({})),
            ("tempreature", json!(null)),
            ("model", json!(3)),
            ("messages", json!([["user", "x"]])),
            ("messages", json!([{"role": "user", "content": [{"type": "image_url"}]}])),
            ("prompt", json!("x")),
        ] {
            let error = with(field, value);
            assert!(error.contains(field), "{field}: {error}");
        }
        let several = read(&json!({"prompt": ["x", "y"]})).err().unwrap_or_default();
        assert!(several.contains("several"), "{several}");
        let both = json!({"prompt": "x", "max_tokens": 1, "max_completion_tokens": 2});
        assert!(read(&both).err().unwrap_or_default().contains("max_completion_tokens"));
    }
}
