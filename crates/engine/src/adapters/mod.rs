//! Adapters of a running engine: known by name and id on the host, resident in slots.

mod apply;
mod registry;
mod slots;

pub use apply::{ApplyError, apply};
pub use registry::{AdapterRegistry, RegistryError};
pub use slots::{SlotTable, Slotted};
