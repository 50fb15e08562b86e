//! What exists only in models with routed experts: layouts and rules of routed-expert LoRA.
//!
//! Adapters that touch routed experts are refused at load until their layouts are read here; see
//! the code `routed-expert-layout` in `lora-core`.
#![warn(missing_docs)]
