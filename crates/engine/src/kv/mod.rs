//! Memory for keys and values: who holds which block, and which prefixes are known. Pure: no device
//! types; the memory itself is [`crate::model::KvCache`].

mod cache;
mod pool;
mod prefix;

pub use cache::{BlockCopy, KvBlocks, KvPlan, Opening, PrefixStats};
pub use pool::{BlockId, BlockPool};
pub use prefix::{Match, PrefixTree, Root};
