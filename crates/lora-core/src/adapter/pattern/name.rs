//! Keys that are names: machines write one for each module, thousands at times, and they need no
//! regular expression.

/// A key of letters, digits, `_`, `-` and dots, perhaps between `^` and `$`. It matches what the
/// pattern of the same text does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct NamePattern {
    /// Whether it starts where the name does.
    whole: bool,
    /// Its characters; `None` is any (a dot without a backslash).
    elements: Vec<Option<char>>,
}

impl NamePattern {
    /// Reads a key; `None` if it has anything else in it.
    pub fn parse(key: &str) -> Option<Self> {
        let (whole, key) = match key.strip_prefix('^') {
            Some(rest) => (true, rest),
            None => (false, key),
        };
        let key = key.strip_suffix('$').unwrap_or(key);
        let mut elements = Vec::with_capacity(key.len());
        let mut rest = key.chars();
        while let Some(element) = rest.next() {
            elements.push(match element {
                '.' => None,
                '\\' => Some(rest.next().filter(|escaped| *escaped == '.')?),
                '_' | '-' => Some(element),
                _ => Some(Some(element).filter(char::is_ascii_alphanumeric)?),
            });
        }
        Some(Self { whole, elements })
    }

    /// Whether it matches the end of the name, from a dot or from the start.
    pub fn matches(&self, name: &str) -> bool {
        let mut rest = name.chars();
        let fits = self.elements.iter().rev().all(|element| match (rest.next_back(), element) {
            (Some(found), Some(expected)) => found == *expected,
            (Some(_), None) => true,
            (None, _) => false,
        });
        let front = rest.as_str();
        fits && (front.is_empty() || (!self.whole && front.ends_with('.')))
    }
}
