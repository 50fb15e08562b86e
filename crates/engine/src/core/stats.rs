//! Counters of a running engine.

use std::time::Duration;

use crate::adapters::{Tier, TierStats};
use crate::executor::GraphStats;
use crate::kv::PrefixStats;
use crate::scheduler::SchedulerStats;

/// Counters since the engine's start, and the current fill of its caches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EngineStats {
    /// Steps computed.
    pub steps: u64,
    /// Steps launched by overlap scheduling, before the previous step's tokens were read.
    pub overlapped_steps: u64,
    /// Tokens sampled.
    pub generated_tokens: u64,
    /// Prompt tokens computed, without those found in the KV cache.
    pub prompt_tokens: u64,
    /// CUDA graphs recorded and replayed.
    pub graphs: GraphStats,
    /// Waiting and running sequences.
    pub scheduler: SchedulerStats,
    /// KV blocks.
    pub kv: KvStats,
    /// Adapter tiers.
    pub adapters: AdapterStats,
}

/// The KV cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvStats {
    /// Number of blocks.
    pub blocks: usize,
    /// Blocks held by sequences.
    pub held: usize,
    /// Prefix reuse, in tokens.
    pub prefix: PrefixStats,
}

/// The adapter tiers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AdapterStats {
    /// Hits, misses and evictions.
    pub use_of_tiers: TierStats,
    /// Host memory.
    pub host: Tier,
    /// Slots of the device.
    pub device: Tier,
    /// Running sequences that use an adapter.
    pub in_use: usize,
    /// Total time spent reading adapters.
    pub read_time: Duration,
    /// Time of the slowest read.
    pub longest_read: Duration,
}
