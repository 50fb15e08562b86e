//! What one rendering of a chat template may cost.
//!
//! Templates come with models and adapters, so they are strangers' programs. Steps are counted by
//! minijinja (its fuel); the text and lists that they make are counted here, against one budget for the
//! whole rendering, intermediate results included.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use minijinja::value::{Object, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Instructions of one rendering. Real templates run some hundred for each message.
pub(super) const MAX_STEPS: u64 = 10_000_000;

/// Bytes that one rendering may make, intermediate results included. A prompt of a million tokens has
/// about four megabytes, and real templates copy a message about ten times.
pub(super) const MAX_BYTES: usize = 256 << 20;

/// How long one rendering may take; real ones take milliseconds.
const MAX_TIME: Duration = Duration::from_secs(5);

/// Elements of one list, those of its elements included.
pub(super) const MAX_ITEMS: usize = 1 << 20;

/// Lists and dicts within each other.
const MAX_DEPTH: usize = 64;

/// Bytes of a string that is taken apart into characters, which are values of their own.
const MAX_CHARS: usize = 1 << 20;

/// What an element of a list or dict counts, beside its text.
pub(super) const ELEMENT: usize = 64;

/// Which limit a template went over.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct OverLimit(String);

/// An error that says what a template did.
pub(super) fn over(did: String) -> Error {
    let error = Error::new(ErrorKind::InvalidOperation, "a limit of templates was reached");
    error.with_source(OverLimit(did))
}

fn over_bytes() -> Error {
    over(format!("makes more than {MAX_BYTES} bytes of text and lists"))
}

/// What a rendering has used so far.
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

/// Fails if the rendering may not make `bytes` more; to be asked before they are made.
pub(super) fn affordable(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    let used = Budget::of(state).bytes.load(Ordering::Relaxed);
    if bytes > MAX_BYTES.saturating_sub(used) { Err(over_bytes()) } else { Ok(()) }
}

/// Counts `bytes` that are made.
pub(super) fn charge(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    affordable(state, bytes)?;
    let budget = Budget::of(state);
    budget.bytes.fetch_add(bytes, Ordering::Relaxed);
    match budget.since.elapsed() > MAX_TIME {
        true => Err(over(format!("takes more than {} seconds", MAX_TIME.as_secs()))),
        false => Ok(()),
    }
}

/// Counts a value that was made, and fails if it is larger or deeper than values may be.
pub(super) fn made(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    check_shape(&value)?;
    charge(state, size(&value))?;
    Ok(value)
}

/// Bytes of a value of its own: text, or elements and their text.
pub(super) fn size(value: &Value) -> usize {
    let text = |value: &Value| value.as_str().map_or(0, str::len);
    let elements = value.len().unwrap_or(0).saturating_mul(ELEMENT);
    match value.kind() {
        ValueKind::String => text(value),
        ValueKind::Seq => {
            let texts = value.try_iter().into_iter().flatten().map(|value| text(&value));
            texts.fold(elements, usize::saturating_add)
        }
        ValueKind::Map => elements,
        _ => ELEMENT,
    }
}

/// Fails if a value has too many elements, or elements within elements, for what walks over it. A
/// namespace within another value is refused, as only they can be made to hold themselves.
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

/// Fails if a string is too long to be taken apart into characters.
pub(super) fn check_chars(value: &Value) -> Result<(), Error> {
    match value.as_str().is_some_and(|text| text.len() > MAX_CHARS) {
        true => Err(over(format!("takes a string of more than {MAX_CHARS} bytes apart"))),
        false => Ok(()),
    }
}

/// Bytes of a value as it prints.
pub(super) fn printed(value: &Value) -> Result<usize, Error> {
    let mut counter = Counter(0);
    match value.as_str() {
        Some(text) => Ok(text.len()),
        None => write!(counter, "{value}").map(|()| counter.0).map_err(|_| over_bytes()),
    }
}

/// Counts what is written to it, up to the limit.
struct Counter(usize);

impl Write for Counter {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 += text.len();
        if self.0 > MAX_BYTES { Err(fmt::Error) } else { Ok(()) }
    }
}
