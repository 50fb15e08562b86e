//! LoRA as an argument of ops: sites of a model, slots for adapters, and the adapter of each row of a batch.

mod plan;
mod site;

pub use plan::LoraPlan;
pub use site::{LoraSite, SiteKind, SiteSpec, SlotLowRank, SlotRows, SlotSlice};
