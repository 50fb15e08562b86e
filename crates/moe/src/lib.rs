//! What exists only in models with routed experts: layouts and rules of routed-expert LoRA.
//!
//! - [`rules`] says what routed-expert LoRA needs of an engine when it is built and at every step.
//!   Its functions take plain values, so that any engine can ask them before it allocates.
//! - [`layout`] makes synthetic adapters in the layout that routed experts have in memory.
//!
//! Files of adapters are read by `lora-core`, which also has the layouts on disk
//! ([`ExpertLayout`]).
#![warn(missing_docs)]

mod backend;
pub mod layout;
pub mod rules;

pub use backend::{MoeBackendName, UnknownMoeBackend};
pub use lora_core::ExpertLayout;
