//! LoRA as an argument of an op: sites of a model, slots of adapters, rows of a step.

mod plan;
mod site;

pub use plan::LoraPlan;
pub use site::{LoraSite, SiteKind, SiteSpec, SlotLowRank, SlotRows, SlotSlice};
