//! An adapter in host memory, independent of its file format.

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

/// The origin of an adapter's tensors.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub enum AdapterFormat {
    /// Created in memory.
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

/// Information about an adapter's origin, for people; it does not affect results.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct AdapterInfo {
    /// Kind of file.
    pub format: AdapterFormat,
    /// The path that was loaded.
    pub path: PathBuf,
    /// Weight files that were read.
    pub files: Vec<PathBuf>,
    /// Layout of routed-expert weights in the files; `None` without such weights.
    pub expert_layout: Option<ExpertLayout>,
    /// `base_model_name_or_path` of the configuration.
    pub base_model_name: Option<String>,
    /// `peft_version` of the configuration.
    pub peft_version: Option<String>,
    /// Default rank of the configuration (`r`).
    pub rank: Option<usize>,
    /// Default alpha of the configuration (`lora_alpha`).
    pub alpha: Option<f64>,
    /// Size of all tensors in the files, in bytes.
    pub bytes: u64,
    /// Things that were tolerated, but that the user should know.
    pub warnings: Vec<String>,
    /// How tensors were interpreted whose meaning depends on their content or on the model.
    pub notes: Vec<String>,
}

/// A LoRA adapter: the changes to a model, and an identity.
#[derive(Clone, PartialEq, Debug)]
pub struct Adapter {
    /// The changes, by site.
    pub sites: BTreeMap<SiteKey, SiteWeights>,
    /// Content hash; see [`Generation`].
    pub generation: Generation,
    /// Origin, for people.
    pub source: AdapterInfo,
    /// Targets by its configuration; `None` if it was created without one.
    pub declaration: Option<Declaration>,
    /// DoRA denominators, `rownorm(W + scale * B A)` by output, for sites where the device cannot compute
    /// them from the base weight: where the adapter replaces W, and at the embedding, which is stored
    /// transposed.
    pub norms: BTreeMap<SiteKey, Vec<f32>>,
}

impl Adapter {
    /// Creates an adapter and computes its generation.
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

    /// The largest rank of all sites; 0 without low-rank updates.
    pub fn max_rank(&self) -> usize {
        self.low_ranks().map(|(_, low)| low.rank).max().unwrap_or(0)
    }

    /// Size of all tensors in bytes.
    pub fn bytes(&self) -> usize {
        self.sites.values().flat_map(SiteWeights::tensors).map(|t| t.bytes().len()).sum()
    }

    /// The target modules that the adapter changes in at least one layer.
    pub fn modules(&self) -> BTreeSet<TargetModule> {
        self.sites.keys().filter_map(|key| key.module()).collect()
    }
}
