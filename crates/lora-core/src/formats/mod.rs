//! Adapter files: readers, writers, and the recognition of files that are something else.

pub mod base;
mod error;
mod hashed;
mod options;
mod raw;
mod read;
mod recognise;
mod source;
pub mod write;

pub use base::{BaseError, BaseTensors, BaseWeights};
pub use error::AdapterError;
pub(crate) use error::io_error;
pub use options::ReadOptions;
pub use raw::{ElementType, RawTensor, RawTensors};
pub use read::{load, nemo, peft, probe, resolve_targets, safetensors, source_of, torch};
pub use recognise::{FileKind, Found, recognise};
pub use source::{Source, SourceReader};
