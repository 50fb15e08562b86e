//! Tensor parallelism: which part of a model one of several devices holds.
//!
//! As in Megatron-LM (Shoeybi et al., 2019): q, k, v, gate and up are divided by output features and whole
//! heads, `o` and `down` by input features, so that a layer needs two sums over the ranks. `lm_head` is divided
//! by rows of the vocabulary. Embeddings and norms are whole on every rank, as they are small beside the rest.

use std::borrow::Cow;
use std::ops::Range;

use lora_core::{HostTensor, LowRank, SiteWeights, Split, TargetModule, TokenRows};

use super::{ModelConfig, ModelError};

/// One device of a group that holds a model together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shard {
    /// Its number, from 0.
    pub rank: usize,
    /// Devices of the group.
    pub world: usize,
}

/// What a device holds of a matrix `[out, in]`, and of an adapter's update of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Part {
    /// All of it.
    Whole,
    /// These output features: rows of the matrix and of B.
    Rows(Range<usize>),
    /// These input features: columns of the matrix and of A. Outputs are summed over the ranks, of which
    /// the first one adds what does not depend on the input.
    Cols(Range<usize>, Summand),
}

/// Whether a rank adds biases to the sum over the ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Summand {
    /// The first rank does.
    WithBias,
    /// The others do not.
    WithoutBias,
}

impl Shard {
    /// The only device.
    pub const WHOLE: Self = Self { rank: 0, world: 1 };

    /// Fails unless a model can be divided by as many devices as the group has.
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
        match kv.is_multiple_of(world) || world.is_multiple_of(kv) {
            true => Ok(()),
            false => {
                let found = format!("{world} devices for {kv} key-value heads");
                Err(refused(found, format!("divisors or multiples of {kv}")))
            }
        }
    }

    /// The model as this device computes it: its share of the heads and of the intermediate features. A
    /// head of keys and values that several ranks need is on all of them.
    #[must_use]
    pub fn local(self, config: &ModelConfig) -> ModelConfig {
        ModelConfig {
            heads: config.heads / self.world,
            kv_heads: (config.kv_heads / self.world).max(1),
            intermediate: config.intermediate / self.world,
            ..config.clone()
        }
    }

    /// What this device holds of a module's matrix.
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

    /// What this device holds of the output projection.
    pub fn part_of_head(self, config: &ModelConfig) -> Part {
        match self == Self::WHOLE {
            true => Part::Whole,
            false => Part::Rows(self.share(config.vocab)),
        }
    }

    /// Its share of `extent` equal things.
    pub fn share(self, extent: usize) -> Range<usize> {
        let share = extent / self.world;
        self.rank * share..(self.rank + 1) * share
    }

    /// Its share of the features along which a module is divided.
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
    /// Rows of the part, of a matrix with `rows` rows.
    pub fn rows(&self, rows: usize) -> usize {
        match self {
            Self::Rows(range) => range.len(),
            Self::Whole | Self::Cols(..) => rows,
        }
    }

    /// Columns of the part, of a matrix with `cols` columns.
    pub fn cols(&self, cols: usize) -> usize {
        match self {
            Self::Cols(range, _) => range.len(),
            Self::Whole | Self::Rows(_) => cols,
        }
    }

    /// The part of a matrix.
    pub fn of_matrix(&self, matrix: HostTensor) -> HostTensor {
        match self {
            Self::Whole => matrix,
            Self::Rows(range) => matrix.slice_rows(range.clone()),
            Self::Cols(range, _) => matrix.slice_cols(range.clone()),
        }
    }

    /// The part of numbers that belong to output features and scale them.
    pub fn of_outputs(&self, values: HostTensor) -> HostTensor {
        match self {
            Self::Rows(range) => values.slice_rows(range.clone()),
            Self::Whole | Self::Cols(..) => values,
        }
    }

    /// The part of numbers that are added to output features.
    pub fn of_bias(&self, values: HostTensor) -> Option<HostTensor> {
        match self {
            Self::Cols(_, Summand::WithoutBias) => None,
            _ => Some(self.of_outputs(values)),
        }
    }

    /// The part of what an adapter does at the site.
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

    /// Rows of tokens that are rows of the part, by their place in it.
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
