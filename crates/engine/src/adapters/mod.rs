//! Adapters of a running engine: registered by name and id, read by loader threads, cached in host memory
//! and in slots of the device. [`AdapterTiers`] decides what is cached; the engine thread carries it out.

mod copies;
mod error;
mod loader;
mod registry;
mod tier;
mod tiers;

pub use copies::{CopyQueue, SiteWrite};
pub use error::{RegistryError, WriteError};
pub use loader::{AdapterLoader, ReadOutcome};
pub use registry::{AdapterRegistry, Loaded, Registered};
pub use tier::{Tier, TierSize, TierSizes};
pub use tiers::{AdapterId, AdapterTiers, Order, Residence, TierStats, TooLarge};
