//! Patterns of a PEFT configuration: Python regular expressions, matched with bounded effort.

use std::cell::Cell;

use fancy_regex::{Error, Regex, RegexBuilder, RuntimeError};

use self::name::NamePattern;
use self::python::Syntax;
use crate::rules::{Code, Rejection};

mod class;
mod name;
mod python;

/// Maximum number of atoms in all patterns of one field, with repetitions expanded.
const MAX_ATOMS: usize = 100_000;
/// Atoms that each pattern counts for in addition to its own.
const ATOMS_OF_PATTERN: usize = 100;
/// Maximum number of backtracks for matching one name against all patterns of a field.
const MAX_STEPS: usize = 1_000_000;
/// The backtracks are divided among at least so many patterns; a single one does not need more.
const MIN_SHARES: usize = 10;
/// Maximum length of one pattern.
const MAX_BYTES_OF_TEXT: usize = 4 * MAX_ATOMS;
/// Maximum size of a compiled automaton.
const MAX_BYTES: usize = 16 << 20;

/// Bounds the work for the patterns of one field, so that a large or malicious configuration cannot take
/// unbounded time or memory.
#[derive(Debug)]
pub(crate) struct Budget {
    field: &'static str,
    atoms: usize,
    /// Backtracks for one match.
    steps: usize,
}

impl Budget {
    /// The budget of a field with these patterns.
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
    /// A literal name, or the end of one.
    Name(NamePattern),
    /// Anything else.
    Regex(PythonRegex),
}

impl Pattern {
    /// A pattern that must match the whole name: `re.fullmatch(text, name)`.
    pub fn full(text: &str, budget: &mut Budget) -> Result<Self, Rejection> {
        let syntax = Syntax { flags_at_start: true, ..Syntax::default() };
        PythonRegex::new(text, syntax, |p| format!(r"\A(?:{p})\z"), budget).map(Self::Regex)
    }

    /// A key of `rank_pattern` or `alpha_pattern`, which must match the end of a name, from a dot or
    /// from the start: `re.match(rf"(.*\.)?({key})$", name)`.
    pub fn suffix(key: &str, budget: &mut Budget) -> Result<Self, Rejection> {
        if let Some(name) = NamePattern::parse(key) {
            return Ok(Self::Name(name));
        }
        // The groups of PEFT's pattern are kept, as back-references in the key count them.
        let wrap = |p: &str| format!(r"\A(?:(.*\.)?({p})$)");
        PythonRegex::new(key, Syntax::default(), wrap, budget).map(Self::Regex)
    }

    /// Whether it matches; a rejection if that takes too many steps.
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
    pub fn named(text: &str, budget: &mut Budget) -> Result<Self, Rejection> {
        let syntax = Syntax { names: vec!["idx".to_owned()], ..Syntax::default() };
        // Not in a group, as in PEFT: alternatives of the pattern extend over all of it.
        let wrap = |p: &str| format!(r"\A(?:(?:^|.*?\.){p}\.(?P<idx>[0-9]+)\.)");
        PythonRegex::new(text, syntax, wrap, budget).map(Self)
    }

    /// Any name of one component: `re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)`.
    pub fn any(budget: &mut Budget) -> Result<Self, Rejection> {
        let wrap = |p: &str| format!(r"\A(?:.*?\.{p}\.(?P<idx>[0-9]+)\.)");
        PythonRegex::new(r"[^.]*", Syntax::default(), wrap, budget).map(Self)
    }

    /// The layer number in a name: `None` if the pattern does not match, `Some(None)` if it finds no number.
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
    /// Whether a match took too many steps; others would, too.
    exhausted: Cell<bool>,
}

impl PythonRegex {
    fn new(
        text: &str,
        syntax: Syntax,
        wrap: impl Fn(&str) -> String,
        budget: &mut Budget,
    ) -> Result<Self, Rejection> {
        // Longer patterns are not even parsed.
        if text.len() > MAX_BYTES_OF_TEXT {
            return Err(budget.too_large(text));
        }
        let unreadable = |reason: String| invalid(budget.field, text, &reason);
        let translated = python::translate(text, syntax).map_err(unreadable)?;
        budget.take(text, translated.atoms)?;
        let built = RegexBuilder::new(&wrap(&translated.text))
            .backtrack_limit(budget.steps)
            .delegate_size_limit(MAX_BYTES)
            .build();
        let regex = built.map_err(|error| invalid(budget.field, text, &reason(&error)))?;
        let (field, steps, text) = (budget.field, budget.steps, text.to_owned());
        Ok(Self { field, text, regex, steps, exhausted: Cell::new(false) })
    }

    /// Runs it on a name. `None` for a name with characters for which Python's character classes might differ
    /// from ours; module names have none.
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

/// The error message, without positions, which would be those of the translated pattern.
fn reason(error: &Error) -> String {
    let text = match error {
        Error::ParseError(_, problem) => problem.to_string(),
        other => other.to_string(),
    };
    // The lines before the last one show the position.
    text.lines().last().unwrap_or_default().trim().to_owned()
}

/// A pattern for a message, truncated.
fn shown(pattern: &str) -> String {
    const LONGEST: usize = 200;
    match pattern.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &pattern[..end]),
        None => pattern.to_owned(),
    }
}

#[cfg(test)]
mod tests;
