//! The Jinja environment of chat templates, equivalent to that of transformers.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, Output, State, Value,
    value::{Kwargs, ValueKind},
};

use super::{
    python_json::{JsonStyle, dumps},
    strftime::strftime_utc,
    template_budget::{MAX_STEPS, charge, printed_len},
    template_code::add_functions,
    template_filters::{add_filters, call_method, check_json},
};

/// The message that a template passed to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct TemplateRefusal(pub(super) String);

/// An environment without templates.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_formatter(print_as_python);
    environment.set_unknown_method_callback(call_method);
    environment.set_fuel(Some(MAX_STEPS));
    add_functions(&mut environment);
    add_filters(&mut environment);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", |state: &State<'_, '_>, value: &Value, options: Kwargs| {
        check_json(state, value, options.get("indent")?)?;
        to_json(value, &options)
    });
    environment
}

/// Prints none and booleans as Python does, and other values as minijinja does.
fn print_as_python(
    out: &mut Output<'_>,
    state: &State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    charge(state, printed_len(value)?)?;
    let word = match value.kind() {
        ValueKind::None => "None",
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        _ => return minijinja::escape_formatter(out, state, value),
    };
    out.write_str(word).map_err(Error::from)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, "the template raised an exception");
    Err(error.with_source(TemplateRefusal(message)))
}

/// The current time in UTC, so that prompts do not depend on a server's time zone.
fn strftime_now(format: &str) -> Result<String, Error> {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    strftime_utc(since_epoch.as_secs(), format).map_err(|directive| {
        let detail = format!("strftime_now does not know the directive `{directive}`");
        Error::new(ErrorKind::InvalidOperation, detail)
    })
}

/// transformers' `tojson`: `json.dumps` with `ensure_ascii=False` by default.
fn to_json(value: &Value, options: &Kwargs) -> Result<String, Error> {
    let mut style = JsonStyle {
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        ..JsonStyle::with_indent(options.get("indent")?)
    };
    if let Some(separators) = options.get::<Option<Vec<String>>>("separators")? {
        let [item, key] = <[String; 2]>::try_from(separators).map_err(|found| {
            let detail = format!("`separators` needs 2 strings, not {}", found.len());
            Error::new(ErrorKind::InvalidOperation, detail)
        })?;
        (style.item_separator, style.key_separator) = (item, key);
    }
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "tojson of an undefined value"));
    }
    let unsuitable = |error: serde_json::Error| {
        Error::new(ErrorKind::BadSerialization, "tojson failed").with_source(error)
    };
    let mut json = serde_json::to_value(value).map_err(unsuitable)?;
    if sort_keys {
        json.sort_all_objects();
    }
    dumps(&json, style).map_err(unsuitable)
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, which mark the assistant's text for training, by a
/// condition that is always true.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut rest = source;
    let mut result = String::with_capacity(source.len());
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, after) = tag.split_at(end);
        result.push_str(before);
        let inner = tag.trim_start_matches("{%").trim_end_matches("%}");
        match inner.trim_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+')) {
            "generation" => result.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => result.push_str(&tag.replace("endgeneration", "endif")),
            _ => result.push_str(tag),
        }
        rest = after;
    }
    result + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, Error> {
        environment().render_str(source, minijinja::context! { word => "é<'&" })
    }

    #[test]
    fn tojson_takes_the_arguments_of_json_dumps() {
        let cases = [
            ("{{ {'b': [1, 2.0], 'a': none} | tojson }}", r#"{"b": [1, 2.0], "a": null}"#),
            ("{{ {'b': 1, 'a': true} | tojson(sort_keys=true) }}", r#"{"a": true, "b": 1}"#),
            ("{{ word | tojson }}", r#""é<'&""#),
            ("{{ word | tojson(ensure_ascii=true) }}", r#""\u00e9<'&""#),
            ("{{ [1, {}] | tojson(indent=2) }}", "[\n  1,\n  {}\n]"),
            ("{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}", r#"[1,{"a":2}]"#),
        ];
        for (source, expected) in cases {
            assert_eq!(render(source).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn tojson_refuses_what_json_dumps_does() {
        for source in ["{{ missing | tojson }}", "{{ 1 | tojson(depth=2) }}"] {
            assert!(render(source).is_err(), "{source}");
        }
    }

    #[test]
    fn unknown_directives_of_strftime_now_are_named() {
        let error = render("{{ strftime_now('%Q') }}").unwrap_err();
        assert!(error.to_string().contains("`%Q`"), "{error}");
    }

    #[test]
    fn only_generation_tags_are_replaced() {
        let source = "{%- generation -%} generation {% endgeneration %}{% if generation %}";
        let expected = "{%- if true -%} generation {% endif %}{% if generation %}";
        assert_eq!(without_generation_tags(source), expected);
        assert_eq!(without_generation_tags("a {% b"), "a {% b");
    }
}
