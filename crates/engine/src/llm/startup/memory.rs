//! The plan of a device's memory.

use std::fmt;

use lora_core::Backend;
use serde::Serialize;

/// How a device's memory was divided when the engine started, in bytes.
///
/// On a device with memory of its own, weights and activations are measured, as the difference of free
/// memory before and after. On the host they are computed from the sizes of the matrices.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct MemoryPlan {
    /// Free before the model was loaded, if known.
    pub free_at_start: Option<usize>,
    /// The base model.
    pub weights: usize,
    /// Activations and inputs of a step, and buffers of sampling.
    pub activations: usize,
    /// Budget for adapters on the device. It is reserved only on a device with memory of its own. Where
    /// `max_loras` limits the number of adapters, large adapters may exceed it.
    pub adapters: u64,
    /// Adapter slots.
    pub adapter_slots: usize,
    /// The KV cache.
    pub kv: usize,
    /// Blocks of the KV cache.
    pub kv_blocks: usize,
    /// Tokens that fit the KV cache.
    pub kv_tokens: usize,
    /// Unreserved bytes, if known; scratch memory and CUDA graphs come out of these.
    pub left: Option<usize>,
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(free) = self.free_at_start {
            write!(f, "of {} free: ", Size(free as u64))?;
        }
        let (weights, activations) = (Size(self.weights as u64), Size(self.activations as u64));
        write!(f, "weights {weights}, activations {activations}, ")?;
        if self.adapter_slots > 0 {
            let (bytes, slots) = (Size(self.adapters), self.adapter_slots);
            write!(f, "up to {bytes} of adapters in {slots} slots, ")?;
        }
        write!(f, "keys and values {} for {} tokens", Size(self.kv as u64), self.kv_tokens)?;
        match self.left {
            Some(left) => write!(f, "; {} left", Size(left as u64)),
            None => Ok(()),
        }
    }
}

/// Prints bytes in a readable unit.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..0x10_0000 => write!(f, "{:.0} KiB", bytes / 1024.0),
            0x10_0000..0x4000_0000 => write!(f, "{:.0} MiB", bytes / f64::from(1 << 20)),
            _ => write!(f, "{:.1} GiB", bytes / f64::from(1 << 30)),
        }
    }
}

/// Free memory of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::llm) struct FreeMemory {
    /// Free bytes, if known.
    pub bytes: Option<usize>,
    /// Whether the device shares the host's memory.
    pub shared: bool,
}

impl FreeMemory {
    /// The memory that is free now.
    pub fn of<B: Backend>(be: &B) -> lora_core::Result<Self> {
        Ok(Self { bytes: be.free_memory()?, shared: be.caps().shares_host_memory })
    }

    /// The part of it that one of `world` ranks may take: ranks on the host share its memory.
    pub fn of_rank(self, world: usize) -> Self {
        if !self.shared {
            return self;
        }
        Self { bytes: self.bytes.map(|free| free / world), ..self }
    }

    /// Bytes allocated between `self` and `now`. Other programs allocate and free host memory meanwhile, so on
    /// the host this is `computed` instead.
    pub fn taken(self, now: Self, computed: usize) -> usize {
        match (self.bytes, now.bytes) {
            (Some(before), Some(after)) if !self.shared => before.saturating_sub(after),
            _ => computed,
        }
    }

    /// The free memory without `bytes` that are reserved. On the host nothing is reserved, as other programs
    /// may take the memory in any case.
    pub fn beside(self, bytes: u64) -> Self {
        let bytes = if self.shared { 0 } else { usize::try_from(bytes).unwrap_or(usize::MAX) };
        Self { bytes: self.bytes.map(|free| free.saturating_sub(bytes)), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_on_the_host_share_its_memory() {
        let of = |shared| FreeMemory { bytes: Some(90), shared }.of_rank(3).bytes;
        assert_eq!((of(true), of(false)), (Some(30), Some(90)));
    }

    #[test]
    fn a_plan_prints_the_known_sizes() {
        let plan = MemoryPlan {
            free_at_start: Some(79 << 30),
            weights: 15 << 30,
            activations: 900 << 20,
            adapters: 3 << 29,
            adapter_slots: 8,
            kv: 50 << 30,
            kv_blocks: 12_800,
            kv_tokens: 409_600,
            left: Some(12 << 30),
        };
        assert_eq!(
            plan.to_string(),
            "of 79.0 GiB free: weights 15.0 GiB, activations 900 MiB, up to 1.5 GiB of adapters \
             in 8 slots, keys and values 50.0 GiB for 409600 tokens; 12.0 GiB left"
        );
        let plan = MemoryPlan { free_at_start: None, left: None, ..plan };
        assert!(plan.to_string().starts_with("weights 15.0 GiB"), "{plan}");
        assert!(!MemoryPlan { adapter_slots: 0, ..plan }.to_string().contains("adapters"));
    }

    #[test]
    fn memory_is_measured_and_reserved_on_devices_with_their_own_only() {
        let own = |bytes| FreeMemory { bytes: Some(bytes), shared: false };
        assert_eq!(own(100).taken(own(70), 5), 30);
        assert_eq!(own(100).beside(30), own(70));
        assert_eq!(own(100).beside(u64::MAX), own(0));
        let host = |bytes| FreeMemory { bytes: Some(bytes), shared: true };
        assert_eq!(host(100).taken(host(70), 5), 5);
        assert_eq!(host(100).beside(30), host(100));
    }
}
