//! An adapter in host memory, the same whatever file it came from.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;

use self::generation::Digest;
use crate::config::ExpertLayout;
use crate::device::HostTensor;
use crate::ids::{Generation, LayerIdx};
use crate::modules::TargetModule;

#[cfg(feature = "formats")]
pub(crate) mod check;
#[cfg(feature = "formats")]
mod diff;
pub(crate) mod generation;
mod parts;
#[cfg(feature = "formats")]
pub(crate) mod pattern;
#[cfg(feature = "formats")]
pub(crate) mod targets;

pub use parts::{NormKind, TokenRows};

#[cfg(feature = "formats")]
pub use diff::{Addition, DeltaDiff, SiteDiff, diff};

/// A place in a model that an adapter can change.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SiteKey {
    /// The token embedding.
    Embed,
    /// A linear module of a decoder layer.
    Layer(LayerIdx, TargetModule),
    /// A norm of a decoder layer.
    Norm(LayerIdx, NormKind),
    /// The norm behind the last layer.
    FinalNorm,
    /// The output projection (`lm_head`).
    Head,
}

impl SiteKey {
    /// The target module of a layer's site.
    pub const fn module(self) -> Option<TargetModule> {
        match self {
            Self::Layer(_, module) => Some(module),
            Self::Embed | Self::Norm(..) | Self::FinalNorm | Self::Head => None,
        }
    }

    /// The layer that it belongs to.
    pub const fn layer(self) -> Option<LayerIdx> {
        match self {
            Self::Layer(layer, _) | Self::Norm(layer, _) => Some(layer),
            Self::Embed | Self::FinalNorm | Self::Head => None,
        }
    }

    /// The name of its module in Hugging Face models: `root` stands before `layers`, `path` is that of a
    /// linear module inside its layer; `None` for such a module without a path.
    pub fn hf_name(self, root: &str, path: Option<&str>) -> Option<String> {
        Some(match self {
            Self::Embed => format!("{root}embed_tokens"),
            Self::Layer(layer, _) => format!("{root}layers.{}.{}", layer.0, path?),
            Self::Norm(layer, kind) => format!("{root}layers.{}.{}", layer.0, kind.hf_path()),
            Self::FinalNorm => format!("{root}norm"),
            Self::Head => "lm_head".to_owned(),
        })
    }

    /// Whether it is a norm.
    pub const fn is_norm(self) -> bool {
        matches!(self, Self::Norm(..) | Self::FinalNorm)
    }
}

impl fmt::Display for SiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embed => f.write_str("embed_tokens"),
            Self::Layer(layer, module) => write!(f, "layer {layer} {module}"),
            Self::Norm(layer, kind) => write!(f, "layer {layer} {kind}"),
            Self::FinalNorm => f.write_str("norm"),
            Self::Head => f.write_str("lm_head"),
        }
    }
}

/// Order of the output rows of a module that is several modules in one.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum RowOrder {
    /// Part after part: all of q, then k, then v; gate, then up. The only order of other modules.
    #[default]
    ByPart,
    /// Megatron's order of q, k and v: for each KV head its query heads, then the key head, then
    /// the value head.
    ByKvHead,
}

/// The update `scale * B A` of one site, of tensors that are in memory unless `T` says otherwise.
///
/// On routed experts A and B have the experts as a third, outermost axis, indexed by expert number;
/// where its extent is 1, the matrix is shared by all experts.
#[derive(Clone, PartialEq, Debug)]
pub struct LowRank<T = HostTensor> {
    /// Rows of A and columns of B.
    pub rank: usize,
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rank-stabilised LoRA; never folded into B.
    pub scale: f32,
    /// `[rank, in]`; on the embedding `[rank, vocab]`; on routed experts `[experts, rank, in]`.
    pub a: T,
    /// `[out, rank]`; on routed experts `[experts, out, rank]`.
    pub b: T,
    /// DoRA's magnitude `[out]`: the layer's weight becomes
    /// `magnitude * (W + scale * B A) / rownorm(W + scale * B A)`.
    pub magnitude: Option<T>,
    /// Bias of B, `[out]`: the update of one input is `scale * (B A x + b_bias)`.
    pub b_bias: Option<T>,
    /// Order of B's rows, and of whatever else is `[out]`.
    pub rows: RowOrder,
}

/// Everything that an adapter does at one site.
#[derive(Clone, PartialEq, Debug)]
pub struct SiteWeights<T = HostTensor> {
    /// The low-rank update.
    pub low_rank: Option<LowRank<T>>,
    /// Replaces the base layer's bias, `[out]`.
    pub base_bias: Option<T>,
    /// Replaces the base layer's weight, `[out, in]`, `[vocab, hidden]` or, of a norm, `[width]`; a
    /// low-rank update of the same site adds to it.
    pub replacement: Option<T>,
    /// Replaces rows of the base layer's weight, at the embedding and the output projection; never
    /// beside a replacement of the whole.
    pub rows: Option<TokenRows<T>>,
}

impl<T> Default for SiteWeights<T> {
    fn default() -> Self {
        Self { low_rank: None, base_bias: None, replacement: None, rows: None }
    }
}

impl<T> From<LowRank<T>> for SiteWeights<T> {
    fn from(low_rank: LowRank<T>) -> Self {
        Self { low_rank: Some(low_rank), ..Self::default() }
    }
}

impl<T> SiteWeights<T> {
    /// The tensors that are present.
    pub fn tensors(&self) -> impl Iterator<Item = &T> {
        let low = self.low_rank.as_ref();
        let pair = low.into_iter().flat_map(|l| [&l.a, &l.b]);
        let extras = low.into_iter().flat_map(|l| [l.magnitude.as_ref(), l.b_bias.as_ref()]);
        let rows = self.rows.as_ref().map(|rows| &rows.values);
        let weights = self.base_bias.as_ref().into_iter().chain(&self.replacement).chain(rows);
        pair.chain(extras.flatten()).chain(weights)
    }

    /// The same site of references to its tensors.
    pub fn as_ref(&self) -> SiteWeights<&T> {
        let low_rank = self.low_rank.as_ref().map(|low| LowRank {
            rank: low.rank,
            scale: low.scale,
            a: &low.a,
            b: &low.b,
            magnitude: low.magnitude.as_ref(),
            b_bias: low.b_bias.as_ref(),
            rows: low.rows,
        });
        let rows = self.rows.as_ref();
        SiteWeights {
            low_rank,
            base_bias: self.base_bias.as_ref(),
            replacement: self.replacement.as_ref(),
            rows: rows.map(|rows| TokenRows { ids: rows.ids.clone(), values: &rows.values }),
        }
    }

    /// The same site of other tensors.
    pub fn map<U>(self, mut make: impl FnMut(T) -> U) -> SiteWeights<U> {
        match self.try_map(|tensor| Ok::<U, Infallible>(make(tensor))) {
            Ok(site) => site,
        }
    }

    /// The same site of other tensors; fails with the first that cannot be made.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn try_map<U, E>(
        self,
        mut make: impl FnMut(T) -> Result<U, E>,
    ) -> Result<SiteWeights<U>, E> {
        let low_rank = match self.low_rank {
            Some(low) => Some(LowRank {
                rank: low.rank,
                scale: low.scale,
                a: make(low.a)?,
                b: make(low.b)?,
                magnitude: low.magnitude.map(&mut make).transpose()?,
                b_bias: low.b_bias.map(&mut make).transpose()?,
                rows: low.rows,
            }),
            None => None,
        };
        Ok(SiteWeights {
            low_rank,
            base_bias: self.base_bias.map(&mut make).transpose()?,
            replacement: self.replacement.map(&mut make).transpose()?,
            rows: match self.rows {
                Some(rows) => Some(TokenRows { ids: rows.ids, values: make(rows.values)? }),
                None => None,
            },
        })
    }
}

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

/// Modules chosen by name or by pattern, as PEFT's `target_modules` and `exclude_modules` do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Selector {
    /// Modules whose name is one of these, or ends with `.` and one of these.
    Names(Vec<String>),
    /// Modules whose whole name matches this regular expression.
    Pattern(String),
    /// Every linear layer but the output projection.
    AllLinear,
}

/// PEFT's `layers_to_transform` and `layers_pattern`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerFilter {
    /// Layers that are changed.
    pub layers: BTreeSet<u32>,
    /// Regular expressions for the name in front of the layer's number; empty: any name.
    pub patterns: Vec<String>,
}

/// What a file calls one kind of module inside a layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModuleNaming {
    /// Its path, such as `self_attn.q_proj`.
    pub path: String,
    /// Whether the module map names this very path, so that it needs no other check.
    pub mapped_exactly: bool,
}

/// Which modules the adapter's configuration says it changes, kept so that
/// [`Adapter::check`] can tell when a file and its configuration disagree about a model.
#[derive(Clone, PartialEq, Debug)]
pub struct Declaration {
    /// `target_modules`.
    pub targets: Selector,
    /// `target_parameters`: parameters of routed experts and routers, such as
    /// `mlp.experts.down_proj` and `gate.weight`.
    pub parameters: Vec<String>,
    /// `exclude_modules`.
    pub exclude: Option<Selector>,
    /// `layers_to_transform`; `None`: all layers.
    pub layers: Option<LayerFilter>,
    /// `modules_to_save`.
    pub saved: Vec<String>,
    /// `ensure_weight_tying`.
    pub ensure_weight_tying: bool,
    /// What stands before `layers` in the file's module names: `model.` or nothing.
    pub root: String,
    /// What the file calls the modules that it changes.
    pub naming: BTreeMap<TargetModule, ModuleNaming>,
    /// Sites of which the file has a trained weight, whether or not it differs from the base model's.
    pub saved_sites: BTreeSet<SiteKey>,
}

impl Declaration {
    /// Whether `modules_to_save` names a module of this name, or one that it is a part of. PEFT compares
    /// ends of names, without regard to dots.
    pub fn saves(&self, name: &str) -> bool {
        self.saved.iter().any(|entry| is_saved_by(entry, name))
    }
}

/// Whether an entry of `modules_to_save` names a module, or one that it is a part of.
pub(crate) fn is_saved_by(entry: &str, name: &str) -> bool {
    let mut ends = name.match_indices('.').map(|(at, _)| at).chain([name.len()]);
    ends.any(|end| name[..end].ends_with(entry))
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
