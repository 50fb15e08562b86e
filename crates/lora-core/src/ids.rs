//! Identifier types.

use std::fmt;

/// Zero-based index of a decoder layer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LayerIdx(pub u32);

impl fmt::Display for LayerIdx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Parses a number in a tensor name, which has no sign and no leading zeros.
#[cfg(feature = "formats")]
pub(crate) fn number(digits: &str) -> Option<u32> {
    let canonical = digits == "0" || !digits.starts_with('0');
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|_| canonical && plain)
}

/// Identity of an adapter: the BLAKE3 hash of its content.
///
/// Adapters with the same weights, scales and row order have the same generation, wherever they were read
/// from. Caches are keyed by it, so that an adapter that is reloaded under an old name never uses state of
/// its predecessor.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub [u8; 32]);

impl Generation {
    /// The first twelve hexadecimal digits: enough for a log line, not for a key.
    pub fn short(&self) -> String {
        let mut hex = self.to_string();
        hex.truncate(12);
        hex
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Generation({})", self.short())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_is_shown_as_hexadecimal_digits() {
        let generation = Generation([0xa5; 32]);
        assert_eq!(generation.to_string(), "a5".repeat(32));
        assert_eq!(generation.short(), "a5a5a5a5a5a5");
    }
}
