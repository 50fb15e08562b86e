//! LoRA adapters, and the interface of devices that serve them.
//!
//! - [`Backend`] is the trait for devices. [`Tensor`], [`View`] and [`ViewMut`] are the operands of its ops,
//!   [`ops`] has their argument structs, [`lora`] the sites, slots and rows of adapters.
//! - [`Adapter`] is an adapter in host memory, made of [`HostTensor`]s. [`formats`] reads and writes files,
//!   and [`Adapter::check`] checks an adapter against a model ([`ModelGeometry`]) and settings
//!   ([`LoraConfig`]). Every refusal is a [`Rejection`] with a stable [`Code`].
//!
//! Listing the changes of an adapter, and the rules that it breaks:
//!
//! ```
//! use std::path::Path;
//!
//! use lora_core::formats::{self, AdapterError, ReadOptions};
//! use lora_core::LoraConfig;
//!
//! # fn main() -> Result<(), AdapterError> {
//! # let adapters = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/adapters"));
//! # let path = &adapters.join("llama.attn-r8");
//! let adapter = formats::load(path, &ReadOptions::default())?;
//! for (site, weights) in &adapter.sites {
//!     let rank = weights.low_rank.as_ref().map(|low_rank| low_rank.rank);
//!     println!("{site}: rank {rank:?}");
//! }
//! let strict = LoraConfig { max_lora_rank: 4, ..LoraConfig::default() };
//! for rejection in adapter.check_limits(&strict) {
//!     println!("{}: found {}; {}", rejection.setting, rejection.found, rejection.remedy);
//! }
//! # assert!(!adapter.sites.is_empty() && !adapter.check_limits(&strict).is_empty());
//! # Ok(())
//! # }
//! ```
#![warn(missing_docs)]

mod adapter;
mod config;
mod device;
pub mod files;
#[cfg(feature = "formats")]
pub mod formats;
mod geometry;
mod ids;
mod modules;
mod rules;
#[cfg(feature = "testkit")]
pub mod testkit;

pub use adapter::{
    Adapter, AdapterFormat, AdapterInfo, Declaration, LayerFilter, LowRank, ModuleNaming, RowOrder,
    Selector, SiteWeights, TokenRows,
};
#[cfg(feature = "formats")]
pub use adapter::{Addition, DeltaDiff, SiteDiff, diff};
pub use config::{
    AdapterTokenizer, CkptSource, ExpertLayout, LoraConfig, LoraRequest, NemoQkvLayout,
    PeftCacheConfig, QuantAlgo, QuantConfig, validate_adapter_name,
};
pub use device::{
    Backend, Caps, Comm, DType, Error, HostTensor, MatLayout, OneRank, Pool, Result, Tensor, View,
    ViewMut, check, check_extent, fp8, free_bytes, lora, ops,
};
pub use geometry::ModelGeometry;
pub use ids::{Generation, LayerIdx};
pub use modules::{HfNames, ModuleMap, NormKind, SiteKey, Split, TargetModule};
pub use rules::{Code, Rejection, Rejections, Stage};
