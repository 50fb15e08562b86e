//! Filters and methods whose results can be much larger than their arguments, with a check of the result's
//! size before they run.

use minijinja::value::{Rest, StringInput};
use minijinja::{Environment, Error, State, Value, filters};
use minijinja_contrib::pycompat;

use super::template_budget::{
    ELEMENT_BYTES, MAX_ITEMS, affordable, check_chars, check_shape, over, printed_len,
};

/// Largest field width of `format`, and largest indentation.
const MAX_WIDTH: usize = 4096;

/// Replaces minijinja's filters by checked ones.
pub(super) fn add_filters(env: &mut Environment<'_>) {
    env.add_filter("replace", replace);
    env.add_filter("join", join);
    env.add_filter("split", split);
    env.add_filter("lines", lines);
    env.add_filter("string", string);
    for (name, filter) in [
        ("batch", Value::from_function(filters::batch)),
        ("chain", Value::from_function(filters::chain)),
        ("format", Value::from_function(filters::format)),
        ("groupby", Value::from_function(filters::groupby)),
        ("indent", Value::from_function(filters::indent)),
        ("list", Value::from_function(filters::list)),
        ("map", Value::from_function(filters::map)),
        ("max", Value::from_function(filters::max)),
        ("min", Value::from_function(filters::min)),
        ("reject", Value::from_function(filters::reject)),
        ("rejectattr", Value::from_function(filters::rejectattr)),
        ("select", Value::from_function(filters::select)),
        ("selectattr", Value::from_function(filters::selectattr)),
        ("slice", Value::from_function(filters::slice)),
        ("sort", Value::from_function(filters::sort)),
        ("sum", Value::from_function(filters::sum)),
        ("unique", Value::from_function(filters::unique)),
        ("zip", Value::from_function(filters::zip)),
    ] {
        env.add_filter(name, move |state: &State<'_, '_>, args: Rest<Value>| {
            check_arguments(state, name, &args)?;
            filter.call(state, &args)
        });
    }
    // These are for debugging templates, and print values of any size.
    env.remove_filter("pprint");
    env.remove_global("debug");
}

/// Checks the arguments of a filter before minijinja's implementation runs.
fn check_arguments(state: &State<'_, '_>, name: &str, args: &[Value]) -> Result<(), Error> {
    let Some((value, options)) = args.split_first() else { return Ok(()) };
    match name {
        "format" => check_format(state, value, options),
        "indent" => {
            let lines = value.as_str().map_or(0, |text| text.matches('\n').count() + 1);
            let width = options.iter().filter_map(Value::as_usize).max().unwrap_or(4);
            check_width(width)?;
            affordable(state, lines.saturating_mul(width))
        }
        _ => {
            let counts = options.iter().filter_map(Value::as_usize);
            if counts.max().is_some_and(|count| count > MAX_ITEMS) {
                return Err(over(format!("asks {name} for more than {MAX_ITEMS} elements")));
            }
            check_chars(value)
        }
    }
}

fn check_width(width: usize) -> Result<(), Error> {
    if width > MAX_WIDTH {
        return Err(over(format!("asks for a width above {MAX_WIDTH}")));
    }
    Ok(())
}

/// Checks `'...' | format(...)` and `'...'.format(...)`. Every field is as long as its width or its argument.
fn check_format(state: &State<'_, '_>, format: &Value, args: &[Value]) -> Result<(), Error> {
    let format = format.as_str().unwrap_or_default();
    for number in format.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty()) {
        check_width(number.parse().unwrap_or(usize::MAX))?;
    }
    let widths = args.iter().filter_map(Value::as_usize).filter(|_| format.contains(['*', '{']));
    if format.contains('*') || format.contains(":{") {
        check_width(widths.max().unwrap_or(0))?;
    }
    let mut longest = MAX_WIDTH;
    for arg in args {
        // Keyword arguments come as one dict.
        longest = longest.max(printed_len(arg)?);
    }
    let fields = format.matches(['%', '{']).count();
    affordable(state, fields.saturating_mul(longest).saturating_add(format.len()))
}

fn replace(
    state: &State<'_, '_>,
    value: StringInput<'_>,
    from: StringInput<'_>,
    to: StringInput<'_>,
) -> Result<Value, Error> {
    check_replace(state, value.as_str(), from.as_str(), to.as_str())?;
    filters::replace(state, value, from, to)
}

fn check_replace(state: &State<'_, '_>, text: &str, from: &str, to: &str) -> Result<(), Error> {
    let added = text.matches(from).count().saturating_mul(to.len());
    affordable(state, added.saturating_add(text.len()))
}

fn join(
    state: &State<'_, '_>,
    value: &Value,
    joiner: Option<StringInput<'_>>,
) -> Result<Value, Error> {
    check_join(state, value, joiner.as_ref().map_or("", |joiner| joiner.as_str()))?;
    filters::join(state, value, joiner)
}

fn check_join(state: &State<'_, '_>, value: &Value, joiner: &str) -> Result<(), Error> {
    check_chars(value)?;
    let mut bytes = 0_usize;
    for item in value.try_iter().into_iter().flatten() {
        bytes = bytes.saturating_add(joiner.len()).saturating_add(printed_len(&item)?);
        affordable(state, bytes)?;
    }
    Ok(())
}

fn split(state: &State<'_, '_>, Rest(args): Rest<Value>) -> Result<Value, Error> {
    check_split(state, args.first(), args.get(1))?;
    Value::from_function(filters::split).call(state, &args)
}

fn lines(state: &State<'_, '_>, Rest(args): Rest<Value>) -> Result<Value, Error> {
    check_split(state, args.first(), Some(&Value::from("\n")))?;
    Value::from_function(filters::lines).call(state, &args)
}

/// Checks the number of pieces of a split text.
fn check_split(
    state: &State<'_, '_>,
    text: Option<&Value>,
    at: Option<&Value>,
) -> Result<(), Error> {
    let text = text.and_then(Value::as_str).unwrap_or_default();
    let pieces = match at.and_then(Value::as_str) {
        Some(separator) => text.matches(separator).count(),
        None => text.matches(char::is_whitespace).count(),
    };
    affordable(state, (pieces + 1).saturating_mul(ELEMENT_BYTES).saturating_add(text.len()))
}

fn string(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    affordable(state, printed_len(value)?)?;
    filters::string(state, value)
}

/// Checks the size of a value's JSON: at most six bytes for each printed byte (`\uXXXX`), and at most one
/// indented line for each.
pub(super) fn check_json(
    state: &State<'_, '_>,
    value: &Value,
    indent: Option<usize>,
) -> Result<(), Error> {
    check_shape(value)?;
    let bytes = printed_len(value)?;
    check_width(indent.unwrap_or(0))?;
    let of_lines = bytes.saturating_mul(indent.unwrap_or(0));
    affordable(state, bytes.saturating_mul(6).saturating_add(of_lines))
}

/// Calls a Python method of a string, list or dict, after a check of its result's size.
pub(super) fn call_method(
    state: &State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match (method, args) {
        ("replace", [from, to, ..]) => {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            check_replace(state, &text(value), &text(from), &text(to))?;
        }
        ("join", [items, ..]) => check_join(state, items, value.as_str().unwrap_or_default())?,
        ("format", _) => check_format(state, value, args)?,
        ("split", _) => check_split(state, Some(value), args.first())?,
        ("splitlines", _) => check_split(state, Some(value), Some(&Value::from("\n")))?,
        _ => (),
    }
    pycompat::unknown_method_callback(state, value, method, args)
}
