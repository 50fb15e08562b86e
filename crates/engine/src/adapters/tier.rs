//! Capacity and fill of one tier of the adapter cache.

use std::fmt;

/// Capacity of a tier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TierSize {
    /// Most adapters; `None`: unlimited.
    pub adapters: Option<usize>,
    /// Most bytes, each adapter counted at its true ranks; `None`: unlimited.
    pub bytes: Option<u64>,
}

impl TierSize {
    /// A capacity in adapters, whatever their size.
    pub const fn of_adapters(adapters: usize) -> Self {
        Self { adapters: Some(adapters), bytes: None }
    }
}

/// Capacities of both tiers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TierSizes {
    /// Host memory.
    pub host: TierSize,
    /// Slots of the device.
    pub device: TierSize,
}

impl TierSizes {
    /// Capacities in adapters, whatever their size.
    pub const fn of_adapters(host: usize, device: usize) -> Self {
        Self { host: TierSize::of_adapters(host), device: TierSize::of_adapters(device) }
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

/// A tier: its capacity and fill.
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

    /// Its capacity.
    pub fn size(&self) -> TierSize {
        self.size
    }

    /// Number of adapters in it.
    pub fn adapters(&self) -> usize {
        self.adapters
    }

    /// Bytes of the adapters in it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether another adapter of `bytes` bytes fits.
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
