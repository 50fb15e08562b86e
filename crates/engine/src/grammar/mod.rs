//! Texts of a given shape: JSON that a schema accepts, matches of a regular expression, sentences of a
//! grammar.
//!
//! The parsing is llguidance's. This module tells it the bytes of every token, sets its limits,
//! and turns its sets of tokens into the masks of [`lora_core::ops::SampleArgs::masks`].

mod bounds;
mod compiler;
mod error;
mod matcher;
mod vocabulary;

pub use compiler::GuideCompiler;
pub use error::GuideError;
pub use matcher::{Allowed, GuideMatcher};
