//! Chat messages, whose content is a string or a list of text parts.

use std::fmt;

use loramux_engine::sampling::Object;
use loramux_engine::text::ChatMessage;
use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// A list of messages.
pub(super) type Messages = Vec<Object<Message>>;

/// A message.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Message {
    role: String,
    #[serde(deserialize_with = "content")]
    content: String,
}

/// Converts messages to the engine's type.
pub(super) fn chat(messages: Messages) -> Vec<ChatMessage> {
    let message =
        |Object(message): Object<Message>| ChatMessage::new(message.role, message.content);
    messages.into_iter().map(message).collect()
}

fn content<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    deserializer.deserialize_any(ContentVisitor)
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(r#"a text, or a list of {"type": "text", "text": ...}"#)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    /// Joins text parts by newlines, as vLLM does for chat templates that take a string.
    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<String, A::Error> {
        let mut texts = Vec::new();
        while let Some(part) = parts.next_element::<Map<String, Value>>()? {
            texts.push(part_text(part).map_err(A::Error::custom)?);
        }
        Ok(texts.join("\n"))
    }
}

fn part_text(mut part: Map<String, Value>) -> Result<String, String> {
    let kind = part.shift_remove("type");
    if kind.as_ref().and_then(Value::as_str) != Some("text") {
        let kind = kind.unwrap_or_default();
        return Err(format!("a content part is of type {kind}; only \"text\" is supported"));
    }
    let text = match part.shift_remove("text") {
        Some(Value::String(text)) => text,
        _ => return Err("a content part has no \"text\" that is a string".to_owned()),
    };
    match part.keys().next() {
        Some(field) => Err(format!("unknown field `{field}` in a content part")),
        None => Ok(text),
    }
}
