//! Fields of adapter configurations: a policy for each, and typed access.

use serde_json::{Map, Value};

use crate::rules::{Code, Rejection};

/// How a configuration field is handled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Policy {
    /// It is read, and each of its values is either applied or refused.
    Applied,
    /// It does not affect inference.
    Irrelevant,
    /// It does not affect inference on the models that are served. If it is set, a warning gives the
    /// reason.
    Harmless(&'static str),
    /// It asks for something unsupported unless it is empty; the text is the remedy.
    MustBeEmpty(&'static str),
}

/// Whether a value is null, false, "", [] or {}.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// Checks every field by the table of policies; returns warnings.
pub(super) fn check_policies(
    map: &Map<String, Value>,
    table: &[(&str, Policy)],
    allow_unknown: bool,
    problems: &mut Vec<Rejection>,
) -> Vec<String> {
    let mut warnings = Vec::new();
    for (name, value) in map {
        let policy = table.iter().find(|(field, _)| field == name).map(|(_, policy)| *policy);
        match policy {
            Some(Policy::Applied | Policy::Irrelevant) => {}
            Some(Policy::Harmless(why)) => {
                if !is_empty(value) {
                    warnings.push(format!("{name}: {} has no effect: {why}", shown(value)));
                }
            }
            Some(Policy::MustBeEmpty(remedy)) => {
                if !is_empty(value) {
                    problems.push(Rejection::new(
                        Code::UnsupportedConfigField,
                        name,
                        shown(value),
                        "no value",
                        remedy,
                    ));
                }
            }
            None if is_empty(value) || allow_unknown => {
                warnings.push(format!("{name}: unknown field ignored ({})", shown(value)));
            }
            None => problems.push(Rejection::new(
                Code::UnknownConfigField,
                name,
                shown(value),
                "a field that is known, or an unknown one without a value",
                "remove it, or set allow_unknown_fields: true if it does not matter for inference",
            )),
        }
    }
    warnings
}

/// A value for a message, truncated.
pub(super) fn shown(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Typed access to fields. Values of a wrong type are added to `problems`.
pub(super) struct Fields<'a> {
    pub map: &'a Map<String, Value>,
    /// Name of the file, for messages.
    pub file: &'static str,
    pub problems: Vec<Rejection>,
}

impl<'a> Fields<'a> {
    /// A field's value; `None` when it is absent or null.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Adds the problem of a wrong value.
    pub fn invalid(&mut self, name: &str, value: &Value, allowed: &str) {
        self.problems.push(Rejection::new(
            Code::InvalidConfigField,
            name,
            shown(value),
            allowed,
            format!("correct {} or export the adapter again", self.file),
        ));
    }

    /// A field converted by `convert`; `None` if it is absent, null, or (a problem) of a wrong type.
    pub fn typed<T>(
        &mut self,
        name: &str,
        allowed: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.get(name)?;
        let converted = convert(value);
        if converted.is_none() {
            self.invalid(name, value, allowed);
        }
        converted
    }

    /// As [`Fields::typed`]; a problem also if it is absent.
    pub fn required<T>(
        &mut self,
        name: &str,
        allowed: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Option<T> {
        if self.get(name).is_none() {
            self.problems.push(Rejection::new(
                Code::MissingConfigField,
                name,
                "no value",
                allowed,
                format!("export the adapter again, or complete {}", self.file),
            ));
        }
        self.typed(name, allowed, convert)
    }

    /// A boolean field; false if absent.
    pub fn flag(&mut self, name: &str) -> bool {
        self.typed(name, "true or false", Value::as_bool).unwrap_or(false)
    }

    /// A string field.
    pub fn text(&mut self, name: &str) -> Option<String> {
        self.typed(name, "a text", |value| value.as_str().map(str::to_owned))
    }
}

/// A positive integer.
pub(super) fn as_count(value: &Value) -> Option<usize> {
    value.as_u64().filter(|n| *n > 0).and_then(|n| usize::try_from(n).ok())
}

/// A list of strings.
pub(super) fn as_names(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn unknown_fields_pass_only_while_they_are_empty() {
        let check = |value: Value, allow| {
            let mut problems = Vec::new();
            let map = Map::from_iter([("new_field".to_owned(), value)]);
            (check_policies(&map, &[], allow, &mut problems).len(), problems.len())
        };
        for empty in [json!(null), json!(false), json!(""), json!([]), json!({})] {
            assert_eq!(check(empty, false), (1, 0));
        }
        for full in [json!(true), json!(0), json!("x"), json!([0]), json!({"a": null})] {
            assert_eq!(check(full.clone(), false), (0, 1));
            assert_eq!(check(full, true), (1, 0));
        }
    }
}
