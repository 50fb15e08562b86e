//! Size and contents of one tier, counted.

use std::fmt;

/// What a tier holds at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TierSize {
    /// Adapters; `None`: any number.
    pub adapters: Option<usize>,
    /// Bytes, each adapter at its true ranks; `None`: any number.
    pub bytes: Option<u64>,
}

impl TierSize {
    /// Room for a number of adapters, whatever their size.
    pub const fn of_adapters(adapters: usize) -> Self {
        Self { adapters: Some(adapters), bytes: None }
    }
}

impl fmt::Display for TierSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.bytes, self.adapters) {
            (Some(bytes), _) => write!(f, "{bytes} bytes"),
            (None, Some(adapters)) => write!(f, "{adapters} adapters"),
            (None, None) => f.write_str("any number of adapters"),
        }
    }
}

/// A tier: its size and how much of it is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tier {
    size: TierSize,
    adapters: usize,
    bytes: u64,
}

impl Tier {
    /// An empty tier.
    pub fn new(size: TierSize) -> Self {
        Self { size, adapters: 0, bytes: 0 }
    }

    /// What it holds at most.
    pub fn size(&self) -> TierSize {
        self.size
    }

    /// Adapters in it.
    pub fn adapters(&self) -> usize {
        self.adapters
    }

    /// Their bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether one more adapter of this size fits.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        let sum = self.bytes.checked_add(bytes);
        let fits = sum.is_some_and(|sum| self.size.bytes.is_none_or(|most| sum <= most));
        fits && self.size.adapters.is_none_or(|most| self.adapters < most)
    }

    pub(super) fn add(&mut self, bytes: u64) {
        self.adapters += 1;
        self.bytes += bytes;
    }

    pub(super) fn remove(&mut self, bytes: u64) {
        self.adapters -= 1;
        self.bytes -= bytes;
    }
}
