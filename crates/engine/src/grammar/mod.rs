//! Guided decoding by JSON schemas, regular expressions and grammars.
//!
//! llguidance does the parsing. This module gives it the bytes of every token, sets its limits, and converts
//! its sets of allowed tokens to the masks of [`lora_core::ops::SampleArgs::masks`].

mod bounds;
mod compiler;
mod error;
mod matcher;
mod vocabulary;

pub use compiler::GuideCompiler;
pub use error::GuideError;
pub use matcher::{Allowed, GuideMatcher};
