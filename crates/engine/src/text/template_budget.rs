//! The budget of one rendering of a chat template.
//!
//! Templates come with models and adapters, so they are untrusted programs. minijinja counts instructions (its
//! fuel). The strings and lists that a rendering creates, including intermediate results, are counted here.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use minijinja::value::{Object, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Most instructions of one rendering. Real templates run a few hundred per message.
pub(super) const MAX_STEPS: u64 = 10_000_000;

/// Most bytes that one rendering may create, including intermediate results. A prompt of a million tokens has
/// about four megabytes, and real templates copy a message about ten times.
pub(super) const MAX_BYTES: usize = 256 << 20;

/// Longest time of one rendering; real templates take milliseconds.
const MAX_TIME: Duration = Duration::from_secs(5);

/// Most elements of one list, including nested ones.
pub(super) const MAX_ITEMS: usize = 1 << 20;

/// Deepest nesting of lists and dicts.
const MAX_DEPTH: usize = 64;

/// Most bytes of a string that is split into characters, each of which is a value of its own.
const MAX_CHARS: usize = 1 << 20;

/// Bytes counted for an element of a list or dict, besides its text.
pub(super) const ELEMENT_BYTES: usize = 64;

/// The limit that a template exceeded.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct OverLimit(String);

/// The error of a template that exceeded a limit; `did` describes how.
pub(super) fn over(did: String) -> Error {
    let error = Error::new(ErrorKind::InvalidOperation, "a limit of templates was reached");
    error.with_source(OverLimit(did))
}

fn over_bytes() -> Error {
    over(format!("makes more than {MAX_BYTES} bytes of text and lists"))
}

/// Resources that a rendering has used so far.
#[derive(Debug)]
struct Budget {
    bytes: AtomicUsize,
    since: Instant,
}

impl Object for Budget {}

impl Budget {
    fn of(state: &State<'_, '_>) -> std::sync::Arc<Self> {
        let fresh = || Self { bytes: AtomicUsize::new(0), since: Instant::now() };
        state.get_or_set_temp_object("template budget", fresh)
    }
}

/// Fails if the budget does not allow `bytes` more. To be called before they are created.
pub(super) fn affordable(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    let used = Budget::of(state).bytes.load(Ordering::Relaxed);
    if bytes > MAX_BYTES.saturating_sub(used) { Err(over_bytes()) } else { Ok(()) }
}

/// Charges `bytes` to the budget, and checks the time.
pub(super) fn charge(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    affordable(state, bytes)?;
    let budget = Budget::of(state);
    budget.bytes.fetch_add(bytes, Ordering::Relaxed);
    if budget.since.elapsed() > MAX_TIME {
        return Err(over(format!("takes more than {} seconds", MAX_TIME.as_secs())));
    }
    Ok(())
}

/// Charges a created value to the budget. Fails if the value is too large or too deeply nested.
pub(super) fn charge_value(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    check_shape(&value)?;
    charge(state, size(&value))?;
    Ok(value)
}

/// Bytes counted for a value: its text, or its elements and their text.
pub(super) fn size(value: &Value) -> usize {
    let text = |value: &Value| value.as_str().map_or(0, str::len);
    let elements = value.len().unwrap_or(0).saturating_mul(ELEMENT_BYTES);
    match value.kind() {
        ValueKind::String => text(value),
        ValueKind::Seq => {
            let texts = value.try_iter().into_iter().flatten().map(|value| text(&value));
            texts.fold(elements, usize::saturating_add)
        }
        ValueKind::Map => elements,
        _ => ELEMENT_BYTES,
    }
}

/// Fails if a value has too many elements or is too deeply nested, as other code walks it recursively. A
/// namespace within another value is refused: only namespaces are mutable, and could contain themselves.
pub(super) fn check_shape(value: &Value) -> Result<(), Error> {
    walk(value, 0, &mut 0)
}

fn walk(value: &Value, depth: usize, items: &mut usize) -> Result<(), Error> {
    *items += 1;
    if *items > MAX_ITEMS {
        return Err(over(format!("makes a list of more than {MAX_ITEMS} elements")));
    }
    if depth > MAX_DEPTH {
        return Err(over(format!("nests lists more than {MAX_DEPTH} deep")));
    }
    let Some(object) = value.as_object() else { return Ok(()) };
    let is_namespace = object.type_name().ends_with("::Namespace");
    if is_namespace && depth > 0 {
        return Err(over("puts a namespace into another value".to_owned()));
    }
    match value.kind() {
        ValueKind::Map => {
            for (_, inner) in object.try_iter_pairs().into_iter().flatten() {
                walk(&inner, depth + 1, items)?;
            }
        }
        ValueKind::Seq | ValueKind::Iterable if value.len().is_some() => {
            for inner in object.try_iter().into_iter().flatten() {
                walk(&inner, depth + 1, items)?;
            }
        }
        _ => (),
    }
    Ok(())
}

/// Fails if a string is too long to be split into characters.
pub(super) fn check_chars(value: &Value) -> Result<(), Error> {
    if value.as_str().is_some_and(|text| text.len() > MAX_CHARS) {
        return Err(over(format!("takes a string of more than {MAX_CHARS} bytes apart")));
    }
    Ok(())
}

/// Bytes of the printed form of a value.
pub(super) fn printed_len(value: &Value) -> Result<usize, Error> {
    let mut counter = Counter(0);
    match value.as_str() {
        Some(text) => Ok(text.len()),
        None => write!(counter, "{value}").map(|()| counter.0).map_err(|_| over_bytes()),
    }
}

/// Counts the bytes written to it, up to the limit.
struct Counter(usize);

impl Write for Counter {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 += text.len();
        if self.0 > MAX_BYTES { Err(fmt::Error) } else { Ok(()) }
    }
}
