//! Adapters of a running engine: known by name and id, read by threads, held in host memory and in
//! slots of the device.

mod copies;
mod error;
mod loader;
mod registry;
mod tier;
mod tiers;

pub use copies::{CopyQueue, SiteWrite};
pub use error::{RegistryError, WriteError};
pub use loader::{Loader, ReadOutcome};
pub use registry::{AdapterRegistry, Loaded, Registered};
pub use tier::{Tier, TierSize};
pub use tiers::{AdapterId, AdapterTiers, Order, Residence, TierStats, TooLarge};
