//! An adapter in host memory, the same whatever file it came from.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use self::generation::Digest;
use crate::config::ExpertLayout;
use crate::ids::Generation;
use crate::modules::{SiteKey, TargetModule};

#[cfg(feature = "formats")]
pub(crate) mod check;
mod declaration;
#[cfg(feature = "formats")]
mod diff;
pub(crate) mod generation;
#[cfg(feature = "formats")]
pub(crate) mod pattern;
#[cfg(feature = "formats")]
pub(crate) mod targets;
mod weights;

#[cfg(feature = "formats")]
pub(crate) use declaration::is_saved_by;
pub use declaration::{Declaration, LayerFilter, ModuleNaming, Selector};
pub use weights::{LowRank, RowOrder, SiteWeights, TokenRows};

#[cfg(feature = "formats")]
pub use diff::{Addition, DeltaDiff, SiteDiff, diff};

/// Where an adapter's tensors came from.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub enum AdapterFormat {
    /// Made in memory.
    #[default]
    Memory,
    /// A PEFT directory with safetensors files.
    PeftSafetensors,
    /// A PEFT directory with a torch pickle.
    PeftTorch,
    /// A NeMo archive.
    Nemo,
}

impl fmt::Display for AdapterFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::PeftSafetensors => "PEFT safetensors",
            Self::PeftTorch => "PEFT torch pickle",
            Self::Nemo => "NeMo archive",
        })
    }
}

/// What is worth telling about an adapter's origin; nothing here changes what it computes.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct AdapterInfo {
    /// Kind of file.
    pub format: AdapterFormat,
    /// The path that was loaded.
    pub path: PathBuf,
    /// Every weight file that was read.
    pub files: Vec<PathBuf>,
    /// How the weights of routed experts lie in the files; `None` without such weights.
    pub expert_layout: Option<ExpertLayout>,
    /// `base_model_name_or_path` of the configuration.
    pub base_model_name: Option<String>,
    /// `peft_version` of the configuration.
    pub peft_version: Option<String>,
    /// Default rank of the configuration (`r`).
    pub rank: Option<usize>,
    /// Default alpha of the configuration (`lora_alpha`).
    pub alpha: Option<f64>,
    /// Bytes of all tensors in the files.
    pub bytes: u64,
    /// Things that were tolerated and that a person should know.
    pub warnings: Vec<String>,
    /// What was made of parts whose meaning depends on their content or on the model.
    pub notes: Vec<String>,
}

/// A LoRA adapter: what it changes, and its identity.
#[derive(Clone, PartialEq, Debug)]
pub struct Adapter {
    /// The changes, by site.
    pub sites: BTreeMap<SiteKey, SiteWeights>,
    /// Hash of everything that the adapter computes with; see [`Generation`].
    pub generation: Generation,
    /// Origin, for people.
    pub source: AdapterInfo,
    /// What its configuration targets; `None` when it was made without one.
    pub declaration: Option<Declaration>,
    /// The denominators of DoRA, `rownorm(W + scale * B A)` by output, where W is not the base model's
    /// weight as a device has it: where W is replaced, and at the embedding, which is stored transposed.
    pub norms: BTreeMap<SiteKey, Vec<f32>>,
}

impl Adapter {
    /// An adapter of these sites; computes its generation.
    pub fn new(
        sites: BTreeMap<SiteKey, SiteWeights>,
        source: AdapterInfo,
        declaration: Option<Declaration>,
    ) -> Self {
        let digests = sites.iter().map(|(key, site)| (*key, site.as_ref().map(Digest::of)));
        let generation = generation::of_sites(&digests.collect());
        Self { sites, generation, source, declaration, norms: BTreeMap::new() }
    }

    /// Sites with a low-rank update.
    pub fn low_ranks(&self) -> impl Iterator<Item = (SiteKey, &LowRank)> {
        self.sites.iter().filter_map(|(key, site)| Some((*key, site.low_rank.as_ref()?)))
    }

    /// The largest rank of any site; 0 without low-rank updates.
    pub fn max_rank(&self) -> usize {
        self.low_ranks().map(|(_, low)| low.rank).max().unwrap_or(0)
    }

    /// Bytes of all tensors in use.
    pub fn bytes(&self) -> usize {
        self.sites.values().flat_map(SiteWeights::tensors).map(|t| t.bytes().len()).sum()
    }

    /// The target modules that are changed in at least one layer.
    pub fn modules(&self) -> BTreeSet<TargetModule> {
        self.sites.keys().filter_map(|key| key.module()).collect()
    }
}
