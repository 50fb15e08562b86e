//! Keys that are plain names. Tools write one for each module, up to thousands, and matching them as regular
//! expressions would be slow.

/// A key of letters, digits, `_`, `-` and dots, possibly with `^` and `$`. It matches the same names as the
/// pattern of the same text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct NamePattern {
    /// Whether it must match from the start of the name.
    whole: bool,
    /// Its characters; `None` matches any (an unescaped dot).
    elements: Vec<Option<char>>,
}

impl NamePattern {
    /// Parses a key; `None` if it is not a plain name.
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

    /// Whether it matches the end of the name, after a dot or from the start.
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
