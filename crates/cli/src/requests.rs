//! Requests as JSON lines.

use std::io::{self, BufRead};

use engine::text::ChatMessage;
use engine::{GenerateRequest, Prompt, SamplingParams};
use lora_core::LoraRequest;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

/// What holds for lines that do not say otherwise.
#[derive(Clone, Default, Debug)]
pub struct Defaults {
    /// Adapters that lines may name.
    pub adapters: Vec<LoraRequest>,
    /// The adapter of lines that name none.
    pub lora: Option<LoraRequest>,
    /// Fields of the sampling parameters.
    pub sampling: Map<String, Value>,
}

/// One line, answered whatever it holds.
#[derive(Clone, PartialEq, Debug)]
pub struct Line {
    /// Its `id`; null if there is none.
    pub id: Value,
    /// Name of the adapter that it asks for.
    pub lora: Option<String>,
    /// The request, or why there is none.
    pub request: Result<GenerateRequest, String>,
}

/// The fields of a line.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    #[serde(default)]
    id: Value,
    prompt: Option<String>,
    input_ids: Option<Vec<u32>>,
    messages: Option<Vec<ChatMessage>>,
    #[serde(default, deserialize_with = "present")]
    lora: Named,
    lora_request: Option<LoraRequest>,
    sampling: Option<Map<String, Value>>,
}

/// A field that says something else when it is null than when it is left out.
#[derive(Default)]
enum Named {
    #[default]
    Absent,
    Null,
    Name(String),
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Named, D::Error> {
    Ok(Option::deserialize(deserializer)?.map_or(Named::Null, Named::Name))
}

/// Reads all lines; empty ones are skipped. A line that holds no request becomes a [`Line`] with
/// the reason, which names the line by its number, counted from 1.
///
/// # Errors
/// If `reader` fails.
pub fn read_lines(reader: &mut dyn BufRead, defaults: &Defaults) -> io::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (number, bytes) in (1..).zip(reader.split(b'\n')) {
        let bytes = bytes?;
        if !bytes.trim_ascii().is_empty() {
            lines.push(Line::read(&bytes, number, defaults));
        }
    }
    Ok(lines)
}

/// The adapter of this name.
///
/// # Errors
/// A message that lists the names that are known.
pub fn find_adapter<'a>(
    adapters: &'a [LoraRequest],
    name: &str,
) -> Result<&'a LoraRequest, String> {
    adapters.iter().find(|adapter| adapter.lora_name == name).ok_or_else(|| {
        let names: Vec<&str> = adapters.iter().map(|adapter| adapter.lora_name.as_str()).collect();
        let known = match names.is_empty() {
            true => "there are no adapters".to_owned(),
            false => format!("known: {}", names.join(", ")),
        };
        format!("adapter {name:?} is not known; {known}; add it with --adapter NAME=PATH")
    })
}

impl Line {
    fn read(bytes: &[u8], number: usize, defaults: &Defaults) -> Self {
        let at_line = |problem: String| format!("line {number}: {problem}");
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let at = error.valid_up_to();
                let problem = format!("is not UTF-8 from byte {at} on; save the file as UTF-8");
                return Self { id: Value::Null, lora: None, request: Err(at_line(problem)) };
            }
        };
        match serde_json::from_str(text) {
            Ok(fields) => Self::from_fields(fields, number, defaults),
            Err(error) => {
                let (id, lora) = identity(text);
                Self { id, lora, request: Err(at_line(without_line(&error))) }
            }
        }
    }

    fn from_fields(mut fields: Fields, number: usize, defaults: &Defaults) -> Self {
        let id = std::mem::take(&mut fields.id);
        let asked = fields.lora_name().map(str::to_owned);
        let mut lora = asked.or_else(|| Some(defaults.lora.as_ref()?.lora_name.clone()));
        if matches!((&fields.lora, &fields.lora_request), (Named::Null, None)) {
            lora = None;
        }
        let request = fields.into_request(defaults);
        Self { id, lora, request: request.map_err(|problem| format!("line {number}: {problem}")) }
    }
}

/// `id` and adapter of a line that is not a request, as far as they can be made out.
fn identity(text: &str) -> (Value, Option<String>) {
    let mut value: Value = serde_json::from_str(text).unwrap_or_default();
    let name = value["lora"].as_str().or_else(|| value["lora_request"]["lora_name"].as_str());
    let name = name.map(str::to_owned);
    (value.get_mut("id").map(Value::take).unwrap_or_default(), name)
}

/// The message of an error in a single line, where "line 1" would mislead.
fn without_line(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    match message.strip_suffix(&place) {
        Some(bare) => format!("{bare}, at column {}", error.column()),
        None => message,
    }
}

impl Fields {
    fn lora_name(&self) -> Option<&str> {
        match (&self.lora, &self.lora_request) {
            (Named::Name(name), _) => Some(name),
            (_, Some(request)) => Some(&request.lora_name),
            _ => None,
        }
    }

    fn into_request(self, defaults: &Defaults) -> Result<GenerateRequest, String> {
        let prompt = match (self.prompt, self.input_ids, self.messages) {
            (Some(text), None, None) => Prompt::Text(text),
            (None, Some(ids), None) => Prompt::Ids(ids),
            (None, None, Some(messages)) => Prompt::Chat(messages),
            _ => return Err("give exactly one of prompt, input_ids and messages".to_owned()),
        };
        let lora = match (self.lora, self.lora_request) {
            (Named::Name(_), Some(_)) => {
                return Err("give at most one of lora and lora_request".to_owned());
            }
            (Named::Name(name), None) => Some(find_adapter(&defaults.adapters, &name)?.clone()),
            (_, Some(request)) => Some(request),
            (Named::Null, None) => None,
            (Named::Absent, None) => defaults.lora.clone(),
        };
        let sampling = sampling(&defaults.sampling, self.sampling.unwrap_or_default())?;
        Ok(GenerateRequest { prompt, sampling, lora })
    }
}

/// The sampling parameters `given`, completed field by field from `defaults`.
///
/// # Errors
/// A message naming the first field that is not known or has a wrong type, or that asks for
/// something that answers in JSON lines do not carry.
pub fn sampling(
    defaults: &Map<String, Value>,
    given: Map<String, Value>,
) -> Result<SamplingParams, String> {
    let mut fields = defaults.clone();
    fields.extend(given);
    let params: SamplingParams =
        serde_json::from_value(Value::Object(fields)).map_err(|error| error.to_string())?;
    for (field, asked) in [
        ("return_context_logits", params.return_context_logits),
        ("return_generation_logits", params.return_generation_logits),
    ] {
        if asked {
            return Err(format!(
                "sampling parameter `{field}` is true, but JSON lines carry no logits; leave it \
                 out, or use the library"
            ));
        }
    }
    Ok(params)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn defaults() -> Defaults {
        let adapters = vec![LoraRequest::new("a", 0, "pa"), LoraRequest::new("b", 1, "pb")];
        let lora = adapters.first().cloned();
        let Value::Object(sampling) = json!({"max_tokens": 5, "stop": "x"}) else { unreachable!() };
        Defaults { adapters, lora, sampling }
    }

    fn read(text: &[u8]) -> Vec<Line> {
        read_lines(&mut &text[..], &defaults()).unwrap()
    }

    fn adapter(line: &str) -> Option<String> {
        let [line] = &read(line.as_bytes())[..] else { panic!("{line}") };
        let used = line.request.as_ref().unwrap().lora.as_ref().map(|lora| lora.lora_name.clone());
        assert_eq!(used, line.lora);
        used
    }

    #[test]
    fn a_line_overrides_sampling_field_by_field() {
        let lines = read(br#"{"id": 7, "prompt": "p", "sampling": {"max_tokens": 9, "n": 1}}"#);
        let params = &lines[0].request.as_ref().unwrap().sampling;
        assert_eq!((params.max_tokens, params.stop.as_slice()), (Some(9), &["x".to_owned()][..]));
        assert_eq!(lines[0].id, json!(7));
        let lines = read(br#"{"prompt": "p", "sampling": {"max_tokens": null, "stop": null}}"#);
        let params = &lines[0].request.as_ref().unwrap().sampling;
        assert_eq!((params.max_tokens, params.stop.len()), (None, 0));
    }

    #[test]
    fn null_asks_for_the_base_model_and_absence_for_the_default() {
        assert_eq!(adapter(r#"{"prompt": "p"}"#).as_deref(), Some("a"));
        assert_eq!(adapter(r#"{"prompt": "p", "lora": null}"#), None);
        assert_eq!(adapter(r#"{"prompt": "p", "lora": "b"}"#).as_deref(), Some("b"));
        let own = r#"{"prompt": "p", "lora_request": {"lora_name": "c", "lora_int_id": 3}}"#;
        assert_eq!(adapter(own).as_deref(), Some("c"));
    }

    #[test]
    fn blank_lines_are_skipped_but_counted() {
        let lines = read(b"{\"prompt\": \"p\"}\n\n  \r\n{\n\xff\n");
        assert_eq!(lines.len(), 3);
        assert!(lines[1].request.as_ref().unwrap_err().starts_with("line 4: "));
        assert!(lines[2].request.as_ref().unwrap_err().starts_with("line 5: is not UTF-8"));
    }

    #[test]
    fn lines_that_are_no_requests_keep_their_id_and_tell_why() {
        for (line, part) in [
            (r#"{"id": "q", "promt": "p"}"#, "unknown field `promt`"),
            (r#"{"id": "q"}"#, "exactly one of prompt, input_ids and messages"),
            (r#"{"id": "q", "prompt": "p", "input_ids": [1]}"#, "exactly one of"),
            (r#"{"id": "q", "input_ids": [-1]}"#, "-1"),
            (r#"{"id": "q", "prompt": "p", "lora": "z"}"#, "known: a, b"),
            (r#"{"id": "q", "prompt": "p", "prompt": "r"}"#, "duplicate field `prompt`"),
            (r#"{"id": "q", "prompt": "p", "sampling": {"top_p": "x"}}"#, "`top_p`"),
            (r#"{"id": "q", "prompt": "p", "sampling": {"topp": 1}}"#, "`topp`"),
            (
                r#"{"id": "q", "prompt": "p", "sampling": {"return_context_logits": true}}"#,
                "logits",
            ),
        ] {
            let lines = read(line.as_bytes());
            let error = lines[0].request.as_ref().unwrap_err();
            assert!(error.contains(part) && error.starts_with("line 1: "), "{line}: {error}");
            assert_eq!(lines[0].id, json!("q"));
        }
        let both = r#"{"prompt": "p", "lora": "a",
            "lora_request": {"lora_name": "c", "lora_int_id": 3}}"#;
        let error = read(both.replace('\n', "").as_bytes()).remove(0).request.unwrap_err();
        assert!(error.contains("at most one"), "{error}");
    }

    #[test]
    fn columns_are_told_without_a_misleading_line() {
        let lines = read(b"\n{\"prompt\": }");
        let error = lines[0].request.as_ref().unwrap_err();
        assert!(error.starts_with("line 2: ") && error.ends_with("at column 12"), "{error}");
    }
}
