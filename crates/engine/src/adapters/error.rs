//! Why an adapter cannot serve a request.

use std::path::PathBuf;

use lora_core::Error::OutOfMemory;
use lora_core::formats::AdapterError;
use lora_core::free_bytes;
use lora_core::{Code, Rejections};
use thiserror::Error;

use super::tiers::TooLarge;
use crate::text::TextError;

/// Why an adapter could not be written to the device.
#[derive(Debug, Error)]
#[error("{site}: {cause}")]
pub struct WriteError {
    /// The site.
    pub site: String,
    /// The device's error.
    pub cause: lora_core::Error,
}

/// Why a `lora_request` cannot be served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The engine was built without LoRA.
    #[error(
        "lora_request {name:?}: this engine was built without lora_config and would answer as \
         the base model; build it with lora_config"
    )]
    NotConfigured {
        /// Name in the request.
        name: String,
    },
    /// A registered id or name was given with another path.
    #[error(
        "{what} is already used for {known}; it cannot also name {asked}: use another one for \
         another adapter, or unload the first"
    )]
    Conflict {
        /// What is taken: `lora_int_id 0` or `lora_name "x"`.
        what: String,
        /// Path of the registered adapter.
        known: PathBuf,
        /// Path in the request.
        asked: PathBuf,
    },
    /// An adapter was given under a registered name with another id, or under its id with another name.
    #[error("{} is known as {known}; it cannot also be asked for as {asked}", path.display())]
    OtherNames {
        /// The adapter.
        path: PathBuf,
        /// Its registered name and id.
        known: String,
        /// Name and id in the request.
        asked: String,
    },
    /// No adapter has this name.
    #[error("no adapter is named {name:?}; list_adapters gives the names")]
    Unknown {
        /// The name.
        name: String,
    },
    /// The files have changed since they were read first.
    #[error(
        "adapter {name:?}: {path} changed since it was read first; load the adapter again to use \
         the new contents"
    )]
    Changed {
        /// Its name.
        name: String,
        /// Its files.
        path: PathBuf,
    },
    /// The adapter cannot be read.
    #[error("adapter {name:?}: {cause}")]
    Load {
        /// Its name.
        name: String,
        /// Why.
        cause: AdapterError,
    },
    /// A tokenizer, chat template or generation config in the adapter's folder cannot be read.
    #[error(
        "adapter {name:?}, beside its weights in {}: {cause}; or set adapter_tokenizer: base to use the \
         model's tokenizer, chat template and end tokens", path.display()
    )]
    Text {
        /// Its name.
        name: String,
        /// Its folder.
        path: PathBuf,
        /// Which file, and why.
        cause: TextError,
    },
    /// The request or the adapter breaks rules.
    #[error("adapter {name:?}: {cause}")]
    Rejected {
        /// Its name.
        name: String,
        /// All broken rules.
        cause: Rejections,
    },
    /// The adapter is larger than a tier of the cache.
    #[error("adapter {name:?}: {cause}")]
    TooLarge {
        /// Its name.
        name: String,
        /// The sizes, and the setting to raise.
        cause: TooLarge,
    },
    /// The device is out of memory for the adapter.
    #[error(
        "adapter {name:?}: the device is full: {requested} bytes were asked for its part at {site}, \
         {}; unload other adapters, or start the engine with a lower max_loras or a lower \
         kv_cache_config.max_tokens",
        free_bytes(*available)
    )]
    DeviceFull {
        /// Its name.
        name: String,
        /// The site whose write failed.
        site: String,
        /// Bytes requested.
        requested: usize,
        /// Free bytes, if known.
        available: Option<usize>,
    },
    /// The device failed to write the adapter.
    #[error("adapter {name:?}: {cause}")]
    Write {
        /// Its name.
        name: String,
        /// The site, and why.
        cause: WriteError,
    },
}

impl RegistryError {
    /// The rules that the request or the adapter breaks, if that is the reason.
    pub fn rejections(&self) -> Option<&Rejections> {
        match self {
            Self::Rejected { cause, .. } => Some(cause),
            Self::Load { cause, .. } => cause.rejections(),
            _ => None,
        }
    }

    /// Whether the request names an unknown adapter, or files that do not exist.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::Unknown { .. } => true,
            Self::Rejected { cause, .. } => cause.0.iter().any(|r| r.code == Code::AdapterPath),
            Self::Load { cause, .. } => cause.is_not_found(),
            _ => false,
        }
    }

    /// Whether the request cannot name an adapter in this way, whatever its files.
    pub fn is_of_request(&self) -> bool {
        matches!(self, Self::NotConfigured { .. } | Self::Conflict { .. } | Self::OtherNames { .. })
    }

    /// The error of an adapter that could not be written to the device.
    pub(crate) fn not_written(name: String, cause: WriteError) -> Self {
        match cause {
            WriteError { site, cause: OutOfMemory { requested, available, .. } } => {
                Self::DeviceFull { name, site, requested, available }
            }
            cause => Self::Write { name, cause },
        }
    }
}
