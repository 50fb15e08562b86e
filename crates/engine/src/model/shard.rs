//! Tensor parallelism: which part of the model each rank holds.
//!
//! As in Megatron-LM (Shoeybi et al., 2019): q, k, v, gate and up are column-parallel (split by output
//! features, in whole heads), `o` and `down` row-parallel (split by input features), so that a layer needs two
//! all-reduces. `lm_head` is split by rows of the vocabulary. Embeddings and norms are replicated, as they are
//! small beside the rest.

use std::borrow::Cow;
use std::ops::Range;

use lora_core::{HostTensor, LowRank, SiteWeights, Split, TargetModule, TokenRows};

use super::{ModelConfig, ModelError};

/// One rank of a tensor-parallel group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shard {
    /// Its rank, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
}

/// A rank's part of a matrix `[out, in]`, and of an adapter's update of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Part {
    /// All of it.
    Whole,
    /// These output features: rows of the matrix and of B.
    Rows(Range<usize>),
    /// These input features: columns of the matrix and of A. Outputs are summed over the ranks, so only
    /// the first rank adds biases.
    Cols(Range<usize>, Summand),
}

/// Whether a rank adds biases to the sum over the ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Summand {
    /// This rank adds biases: the first one.
    WithBias,
    /// This rank adds none: the others.
    WithoutBias,
}

impl Shard {
    /// A single rank with the whole model.
    pub const WHOLE: Self = Self { rank: 0, world: 1 };

    /// Fails unless the model can be split over the ranks of the group.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] naming the extent.
    pub fn check(self, config: &ModelConfig) -> Result<(), ModelError> {
        let world = self.world;
        let extents = [
            ("attention heads", config.heads),
            ("intermediate features", config.intermediate),
            ("tokens of the vocabulary", config.vocab),
        ];
        for (what, extent) in extents {
            if !extent.is_multiple_of(world) {
                let found = format!("{world} devices for {extent} {what}");
                return Err(refused(found, format!("divisors of {extent}")));
            }
        }
        let kv = config.kv_heads;
        if kv.is_multiple_of(world) || world.is_multiple_of(kv) {
            return Ok(());
        }
        let found = format!("{world} devices for {kv} key-value heads");
        Err(refused(found, format!("divisors or multiples of {kv}")))
    }

    /// The configuration of this rank's shard: its share of the heads and of the intermediate features. With
    /// fewer KV heads than ranks, each KV head is replicated on the ranks that need it.
    #[must_use]
    pub fn local(self, config: &ModelConfig) -> ModelConfig {
        ModelConfig {
            heads: config.heads / self.world,
            kv_heads: (config.kv_heads / self.world).max(1),
            intermediate: config.intermediate / self.world,
            ..config.clone()
        }
    }

    /// This rank's part of a module's matrix.
    pub fn part(self, config: &ModelConfig, module: TargetModule) -> Part {
        let features = self.features(config, module);
        match module.split() {
            _ if self == Self::WHOLE => Part::Whole,
            Split::None => Part::Whole,
            Split::Column => Part::Rows(features),
            Split::Row if self.rank == 0 => Part::Cols(features, Summand::WithBias),
            Split::Row => Part::Cols(features, Summand::WithoutBias),
        }
    }

    /// This rank's part of `lm_head`.
    pub fn part_of_lm_head(self, config: &ModelConfig) -> Part {
        if self == Self::WHOLE { Part::Whole } else { Part::Rows(self.share(config.vocab)) }
    }

    /// This rank's share of `extent` equal units.
    pub fn share(self, extent: usize) -> Range<usize> {
        let share = extent / self.world;
        self.rank * share..(self.rank + 1) * share
    }

    /// This rank's share of the features along which a module is split.
    fn features(self, config: &ModelConfig, module: TargetModule) -> Range<usize> {
        let heads = match module {
            TargetModule::AttnQ | TargetModule::AttnDense => self.share(config.heads),
            TargetModule::AttnK | TargetModule::AttnV => {
                let first = self.rank * config.kv_heads / self.world;
                first..first + (config.kv_heads / self.world).max(1)
            }
            _ => return self.share(config.intermediate),
        };
        heads.start * config.head_dim..heads.end * config.head_dim
    }
}

fn refused(found: String, allowed: String) -> ModelError {
    ModelError::unsupported("tensor_parallel_size", found, allowed)
}

/// A module of a stacked weight matrix (such as q of qkv), by its name in the checkpoint.
pub(super) struct NamedPart {
    pub name: String,
    /// Rows (output features) in the checkpoint.
    pub rows: usize,
    /// This rank's part of it.
    pub part: Part,
}

impl Part {
    /// Number of rows of this part of a matrix with `rows` rows.
    pub fn rows(&self, rows: usize) -> usize {
        match self {
            Self::Rows(range) => range.len(),
            Self::Whole | Self::Cols(..) => rows,
        }
    }

    /// Number of columns of this part of a matrix with `cols` columns.
    pub fn cols(&self, cols: usize) -> usize {
        match self {
            Self::Cols(range, _) => range.len(),
            Self::Whole | Self::Rows(_) => cols,
        }
    }

    /// This part of a matrix.
    pub fn of_matrix(&self, matrix: HostTensor) -> HostTensor {
        match self {
            Self::Whole => matrix,
            Self::Rows(range) => matrix.slice_rows(range.clone()),
            Self::Cols(range, _) => matrix.slice_cols(range.clone()),
        }
    }

    /// This part of a vector over output features that scales them, such as a magnitude.
    pub fn of_outputs(&self, values: HostTensor) -> HostTensor {
        match self {
            Self::Rows(range) => values.slice_rows(range.clone()),
            Self::Whole | Self::Cols(..) => values,
        }
    }

    /// This part of a vector that is added to output features; `None` if another rank adds it.
    pub fn of_bias(&self, values: HostTensor) -> Option<HostTensor> {
        match self {
            Self::Cols(_, Summand::WithoutBias) => None,
            _ => Some(self.of_outputs(values)),
        }
    }

    /// This part of an adapter's weights for a site.
    pub fn of_adapter<'a>(&self, weights: &'a SiteWeights) -> Cow<'a, SiteWeights> {
        if *self == Self::Whole {
            return Cow::Borrowed(weights);
        }
        let SiteWeights { low_rank, base_bias, replacement, rows } = weights;
        Cow::Owned(SiteWeights {
            low_rank: low_rank.as_ref().map(|low| self.of_low_rank(low)),
            base_bias: base_bias.clone().and_then(|bias| self.of_bias(bias)),
            replacement: replacement.clone().map(|matrix| self.of_matrix(matrix)),
            rows: rows.as_ref().map(|rows| self.of_tokens(rows)),
        })
    }

    fn of_low_rank(&self, low: &LowRank) -> LowRank {
        let (mut a, mut b) = (low.a.clone(), low.b.clone());
        match self {
            Self::Whole => (),
            Self::Rows(range) => b = b.slice_rows(range.clone()),
            Self::Cols(range, _) => a = a.slice_cols(range.clone()),
        }
        LowRank {
            a,
            b,
            magnitude: low.magnitude.clone().map(|magnitude| self.of_outputs(magnitude)),
            b_bias: low.b_bias.clone().and_then(|bias| self.of_bias(bias)),
            ..*low
        }
    }

    /// The replaced token rows that are in this part, with ids relative to it.
    fn of_tokens(&self, rows: &TokenRows) -> TokenRows {
        let Self::Rows(range) = self else { return rows.clone() };
        let token = |id: &u32| *id as usize;
        let from = rows.ids.partition_point(|id| token(id) < range.start);
        let to = rows.ids.partition_point(|id| token(id) < range.end);
        TokenRows {
            ids: rows.ids[from..to].iter().map(|id| id - range.start as u32).collect(),
            values: rows.values.slice_rows(from..to),
        }
    }
}
