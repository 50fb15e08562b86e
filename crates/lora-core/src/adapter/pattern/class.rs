//! Sets of ASCII characters.

/// A bit for each character.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Class(pub u128);

impl Class {
    /// The set of `\d`, `\s` or `\w`, or its complement for an upper-case letter.
    pub fn of_escape(escaped: char) -> Option<Self> {
        let mut class = Self::default();
        let ranges: &[(char, char)] = match escaped.to_ascii_lowercase() {
            'd' => &[('0', '9')],
            's' => &[('\t', '\r'), ('\x1c', ' ')],
            'w' => &[('0', '9'), ('A', 'Z'), ('_', '_'), ('a', 'z')],
            _ => return None,
        };
        ranges.iter().for_each(|(low, high)| class.insert(*low, *high));
        Some(if escaped.is_ascii_uppercase() { Self(!class.0) } else { class })
    }

    /// Adds the ASCII characters from `low` to `high`.
    pub fn insert(&mut self, low: char, high: char) {
        for character in u32::from(low)..=u32::from(high).min(127) {
            self.0 |= 1 << character;
        }
    }

    /// The set, or its complement, as a regular expression.
    pub fn text(self, negated: bool) -> String {
        let has = |character: &char| self.0 >> u32::from(*character) & 1 == 1;
        if self.0 == 0 {
            // No name has a line break, so nothing but everything else.
            return if negated { "(?s:.)" } else { r"\n" }.to_owned();
        }
        let mut text = if negated { "[^" } else { "[" }.to_owned();
        // Anywhere else it could make a range.
        text.extend(Some('-').filter(has));
        for character in ('\0'..='\x7f').filter(|c| *c != '-' && has(c)) {
            if character.is_ascii_punctuation() {
                text.push('\\');
            }
            text.push(character);
        }
        text.push(']');
        text
    }
}
