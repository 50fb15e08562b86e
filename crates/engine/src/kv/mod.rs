//! Bookkeeping of the paged KV cache: which sequences hold which block, and which blocks hold known
//! prefixes. No device types; the memory itself is [`crate::model::KvCache`].

mod cache;
mod pool;
mod prefix;

pub use cache::{BlockCopy, KvBlocks, KvPlan, Opening, PrefixStats};
pub use pool::{BlockId, BlockPool};
pub use prefix::{Match, PrefixTree, Root};
