//! LoRA on routed experts: rules, and synthetic adapters.
//!
//! - [`rules`] checks the requirements of routed-expert LoRA when an engine is built and at every step. Its
//!   functions take plain values, so that any engine can call them before it allocates memory.
//! - [`layout`] creates synthetic adapters in the layout that routed experts have in memory.
//!
//! `lora-core` reads adapter files; it also defines the layouts in files ([`ExpertLayout`]).
#![warn(missing_docs)]

mod backend;
pub mod layout;
pub mod rules;

pub use backend::{MoeBackendName, UnknownMoeBackend};
pub use lora_core::ExpertLayout;
