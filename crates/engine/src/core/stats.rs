//! How an engine is doing.

use std::time::Duration;

use crate::adapters::{Tier, TierStats};
use crate::executor::GraphStats;
use crate::kv::PrefixStats;
use crate::scheduler::SchedulerStats;

/// A picture of the engine, with counts since its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EngineStats {
    /// Steps computed.
    pub steps: u64,
    /// Those of them that were handed to the device before the tokens of the step before were known.
    pub overlapped_steps: u64,
    /// Tokens drawn.
    pub generated_tokens: u64,
    /// Prompt tokens computed; those found in the KV cache are not among them.
    pub prompt_tokens: u64,
    /// Steps recorded and replayed.
    pub graphs: GraphStats,
    /// Sequences waiting and running.
    pub scheduler: SchedulerStats,
    /// KV blocks.
    pub kv: KvStats,
    /// Adapter tiers.
    pub adapters: AdapterStats,
}

/// The KV cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvStats {
    /// Blocks in all.
    pub blocks: usize,
    /// Blocks that sequences hold.
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
    /// Uses by running sequences, over all adapters.
    pub in_use: usize,
    /// Time spent reading, over all adapters read.
    pub read_time: Duration,
    /// The longest read.
    pub longest_read: Duration,
}
