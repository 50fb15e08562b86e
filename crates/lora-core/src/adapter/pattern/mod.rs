//! Patterns of a PEFT configuration: regular expressions of Python, matched within bounds.

use std::cell::Cell;

use fancy_regex::{Error, Regex, RegexBuilder, RuntimeError};

use self::name::NamePattern;
use self::python::Syntax;
use crate::rules::{Code, Rejection};

mod class;
mod name;
mod python;

/// Atoms that the patterns of one field may come to, repetitions written out.
const MAX_ATOMS: usize = 100_000;
/// What a pattern counts for beside its atoms.
const ATOMS_OF_PATTERN: usize = 100;
/// Backtracks that matching one name against all patterns of a field may take.
const MAX_STEPS: usize = 1_000_000;
/// Patterns that share these, at least: more for one of them would not make it faster.
const MIN_SHARES: usize = 10;
/// Bytes of one pattern.
const MAX_BYTES_OF_TEXT: usize = 4 * MAX_ATOMS;
/// Bytes of one automaton that a pattern is compiled to.
const MAX_BYTES: usize = 16 << 20;

/// How much work the patterns of one field may be: neither the size of a configuration nor its
/// cunning decides how long it is matched, or what memory that takes.
#[derive(Debug)]
pub(crate) struct Room {
    field: &'static str,
    atoms: usize,
    /// Backtracks of one match.
    steps: usize,
}

impl Room {
    /// Of a field with these patterns.
    pub fn shared_by<'a>(
        field: &'static str,
        patterns: impl IntoIterator<Item = &'a String>,
    ) -> Self {
        let costly = patterns.into_iter().filter(|text| NamePattern::parse(text).is_none());
        let steps = MAX_STEPS / costly.count().max(MIN_SHARES);
        Self { field, atoms: MAX_ATOMS, steps }
    }

    fn take(&mut self, pattern: &str, atoms: usize) -> Result<(), Rejection> {
        let left = self.atoms.checked_sub(atoms.saturating_add(ATOMS_OF_PATTERN));
        self.atoms = left.ok_or_else(|| self.too_large(pattern))?;
        Ok(())
    }

    fn too_large(&self, pattern: &str) -> Rejection {
        let found = format!("`{}`, which is too large with those before it", shown(pattern));
        let allowed = format!("patterns of {MAX_ATOMS} atoms in all, repetitions written out");
        too_complex(self.field, found, &allowed)
    }
}

/// A compiled pattern.
#[derive(Debug)]
pub(crate) enum Pattern {
    /// A module's name, or the end of one.
    Name(NamePattern),
    /// Anything else.
    Regex(PythonRegex),
}

impl Pattern {
    /// A pattern that must match a whole name: `re.fullmatch(text, name)`.
    pub fn full(text: &str, room: &mut Room) -> Result<Self, Rejection> {
        let syntax = Syntax { flags_at_start: true, ..Syntax::default() };
        PythonRegex::new(text, syntax, |p| format!(r"\A(?:{p})\z"), room).map(Self::Regex)
    }

    /// A key of `rank_pattern` or `alpha_pattern`, which must match the end of a name, from a dot or
    /// from the start: `re.match(rf"(.*\.)?({key})$", name)`.
    pub fn suffix(key: &str, room: &mut Room) -> Result<Self, Rejection> {
        if let Some(name) = NamePattern::parse(key) {
            return Ok(Self::Name(name));
        }
        // PEFT's own groups count where the key refers to one by number.
        let wrap = |p: &str| format!(r"\A(?:(.*\.)?({p})$)");
        PythonRegex::new(key, Syntax::default(), wrap, room).map(Self::Regex)
    }

    /// Whether it matches; a rejection if that takes more steps than there are.
    pub fn matches(&self, name: &str) -> Result<bool, Rejection> {
        match self {
            Self::Name(pattern) => Ok(pattern.matches(name)),
            Self::Regex(regex) => Ok(regex.run(name, Regex::is_match)?.unwrap_or(false)),
        }
    }
}

/// An entry of `layers_pattern`: it finds the number of a module's layer.
#[derive(Debug)]
pub(crate) struct LayerPattern(PythonRegex);

impl LayerPattern {
    /// `re.match(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", name)`.
    pub fn named(text: &str, room: &mut Room) -> Result<Self, Rejection> {
        let syntax = Syntax { names: vec!["idx".to_owned()], ..Syntax::default() };
        // Not in a group, as PEFT has it: the pattern's own alternatives divide the whole.
        let wrap = |p: &str| format!(r"\A(?:(?:^|.*?\.){p}\.(?P<idx>[0-9]+)\.)");
        PythonRegex::new(text, syntax, wrap, room).map(Self)
    }

    /// Any name of one component: `re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)`.
    pub fn any(room: &mut Room) -> Result<Self, Rejection> {
        let wrap = |p: &str| format!(r"\A(?:.*?\.{p}\.(?P<idx>[0-9]+)\.)");
        PythonRegex::new(r"[^.]*", Syntax::default(), wrap, room).map(Self)
    }

    /// Whether it matches, and the number that it found: `None` without a match, `Some(None)`
    /// without a number.
    pub fn layer_of(&self, name: &str) -> Result<Option<Option<u32>>, Rejection> {
        let number = |regex: &Regex, name: &str| {
            let number =
                |found: fancy_regex::Captures<'_>| found.name("idx")?.as_str().parse().ok();
            Ok(regex.captures(name)?.map(number))
        };
        Ok(self.0.run(name, number)?.flatten())
    }
}

/// A regular expression of Python.
#[derive(Debug)]
pub(crate) struct PythonRegex {
    field: &'static str,
    text: String,
    regex: Regex,
    steps: usize,
    /// Whether a match took too many steps. Others would, too.
    exhausted: Cell<bool>,
}

impl PythonRegex {
    fn new(
        text: &str,
        syntax: Syntax,
        wrap: impl Fn(&str) -> String,
        room: &mut Room,
    ) -> Result<Self, Rejection> {
        // Longer ones are not even read.
        if text.len() > MAX_BYTES_OF_TEXT {
            return Err(room.too_large(text));
        }
        let unreadable = |reason: String| invalid(room.field, text, &reason);
        let translated = python::translate(text, syntax).map_err(unreadable)?;
        room.take(text, translated.atoms)?;
        let built = RegexBuilder::new(&wrap(&translated.text))
            .backtrack_limit(room.steps)
            .delegate_size_limit(MAX_BYTES)
            .build();
        let regex = built.map_err(|error| invalid(room.field, text, &reason(&error)))?;
        let (field, steps, text) = (room.field, room.steps, text.to_owned());
        Ok(Self { field, text, regex, steps, exhausted: Cell::new(false) })
    }

    /// Runs it on a name. `None` for a name in which Python's classes of characters and ours could
    /// differ; no module of a model has one.
    fn run<T>(
        &self,
        name: &str,
        run: impl Fn(&Regex, &str) -> Result<T, Error>,
    ) -> Result<Option<T>, Rejection> {
        if !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            let reason = format!("it meets a module named {name:?}, which is not ASCII");
            return Err(invalid(self.field, &self.text, &reason));
        }
        if self.exhausted.get() {
            return Err(self.too_slow());
        }
        match run(&self.regex, name) {
            Ok(result) => Ok(Some(result)),
            Err(Error::RuntimeError(
                RuntimeError::BacktrackLimitExceeded | RuntimeError::StackOverflow,
            )) => {
                self.exhausted.set(true);
                Err(self.too_slow())
            }
            Err(error) => Err(invalid(self.field, &self.text, &reason(&error))),
        }
    }

    fn too_slow(&self) -> Rejection {
        let found = format!("`{}`, which backtracks without end", shown(&self.text));
        let allowed = format!("patterns that match a name within {} steps", self.steps);
        too_complex(self.field, found, &allowed)
    }
}

fn invalid(field: &str, pattern: &str, reason: &str) -> Rejection {
    Rejection::new(
        Code::InvalidPattern,
        field,
        format!("`{}` ({reason})", shown(pattern)),
        "a regular expression in the syntax of Python's `re`",
        "correct the pattern, or write the module names out in full",
    )
}

fn too_complex(field: &str, found: String, allowed: &str) -> Rejection {
    let remedy = "simplify the pattern, or write the module names out in full";
    Rejection::new(Code::PatternTooComplex, field, found, allowed, remedy)
}

/// What is wrong, without positions in the translation.
fn reason(error: &Error) -> String {
    let text = match error {
        Error::ParseError(_, problem) => problem.to_string(),
        other => other.to_string(),
    };
    // The lines before the last show where.
    text.lines().last().unwrap_or_default().trim().to_owned()
}

/// A pattern for a message, cut to a readable length.
fn shown(pattern: &str) -> String {
    const LONGEST: usize = 200;
    match pattern.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &pattern[..end]),
        None => pattern.to_owned(),
    }
}

#[cfg(test)]
mod tests;
