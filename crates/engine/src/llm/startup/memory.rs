//! What the memory of a device is for.

use std::fmt;

use lora_core::Backend;
use serde::Serialize;

/// Bytes by what they are for, as decided when the engine started.
///
/// On a device with memory of its own, weights and activations are what was measured there: what was
/// free before less what was free after. Elsewhere they are the bytes of the matrices.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct MemoryPlan {
    /// Free before anything was loaded, where that is known.
    pub free_at_start: Option<usize>,
    /// The base model.
    pub weights: usize,
    /// What a step computes, with the buffers of sampling.
    pub activations: usize,
    /// What adapters on the device may take. It is set aside only where the device has memory of its
    /// own, and where `max_loras` counts adapters, larger ones may take more.
    pub adapters: u64,
    /// Adapters on the device, at most.
    pub adapter_slots: usize,
    /// Keys and values.
    pub kv: usize,
    /// Blocks of keys and values.
    pub kv_blocks: usize,
    /// Tokens that fit them.
    pub kv_tokens: usize,
    /// What nobody was promised, where that is known: scratch memory and recorded steps come out of it.
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

/// Bytes for people.
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

/// Memory that further blocks could take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::llm) struct FreeMemory {
    /// Bytes, where they are known.
    pub bytes: Option<usize>,
    /// Whether it is the host's.
    pub shared: bool,
}

impl FreeMemory {
    /// What is free now.
    pub fn of<B: Backend>(be: &B) -> lora_core::Result<Self> {
        Ok(Self { bytes: be.free_memory()?, shared: be.caps().shares_host_memory })
    }

    /// Bytes taken between `self` and `now`. Others take and give back host memory meanwhile, so
    /// there `computed` is closer.
    pub fn taken(self, now: Self, computed: usize) -> usize {
        match (self.bytes, now.bytes) {
            (Some(before), Some(after)) if !self.shared => before.saturating_sub(after),
            _ => computed,
        }
    }

    /// What is left beside `bytes` that are set aside. Nothing is where the memory is the host's: it
    /// is given to whoever comes first.
    pub fn beside(self, bytes: u64) -> Self {
        let bytes = if self.shared { 0 } else { usize::try_from(bytes).unwrap_or(usize::MAX) };
        Self { bytes: self.bytes.map(|free| free.saturating_sub(bytes)), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_says_what_is_known() {
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
    fn only_memory_of_its_own_is_measured_and_set_aside() {
        let own = |bytes| FreeMemory { bytes: Some(bytes), shared: false };
        assert_eq!(own(100).taken(own(70), 5), 30);
        assert_eq!(own(100).beside(30), own(70));
        assert_eq!(own(100).beside(u64::MAX), own(0));
        let host = |bytes| FreeMemory { bytes: Some(bytes), shared: true };
        assert_eq!(host(100).taken(host(70), 5), 5);
        assert_eq!(host(100).beside(30), host(100));
    }
}
