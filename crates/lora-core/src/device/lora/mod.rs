//! LoRA as an argument of an op: sites of a model, slots of adapters, rows of a batch.

mod batch;
mod site;

pub use batch::{LoraBatch, RowPlan, Spread};
pub use site::{LoraSite, SiteKind, SiteSpec, SlotLowRank, SlotRows, SlotSlice};
