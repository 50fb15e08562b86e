//! The weights of an adapter at one site: a low-rank update, and tensors that replace the model's.

use std::convert::Infallible;

use crate::device::HostTensor;

/// Order of the output rows of a fused module.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum RowOrder {
    /// All of q, then k, then v; gate, then up. Modules that are not fused always have this order.
    #[default]
    ByPart,
    /// Megatron's order of q, k and v: for each KV head its query heads, then the key head, then
    /// the value head.
    ByKvHead,
}

/// The update `scale * B A` of one site. `T` is the tensor type: tensors in memory, or plans, hashes, ...
///
/// On routed experts, A and B have a third, outermost axis that is indexed by expert number. If its extent is
/// 1, all experts share the matrix.
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
    /// Order of the rows of B, the magnitude and the bias.
    pub rows: RowOrder,
}

/// Everything that an adapter changes at one site.
#[derive(Clone, PartialEq, Debug)]
pub struct SiteWeights<T = HostTensor> {
    /// The low-rank update.
    pub low_rank: Option<LowRank<T>>,
    /// Replaces the base layer's bias, `[out]`.
    pub base_bias: Option<T>,
    /// Replaces the base layer's weight, `[out, in]`, `[vocab, hidden]` or, for a norm, `[width]`. A low-rank
    /// update of the same site is added to it.
    pub replacement: Option<T>,
    /// Replaces rows of the base layer's weight, at the embedding and `lm_head`; never together with
    /// `replacement`.
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

    /// The same site with references to its tensors.
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

    /// Converts every tensor.
    pub fn map<U>(self, mut make: impl FnMut(T) -> U) -> SiteWeights<U> {
        match self.try_map(|tensor| Ok::<U, Infallible>(make(tensor))) {
            Ok(site) => site,
        }
    }

    /// Converts every tensor, or fails with the first error.
    ///
    /// # Errors
    /// The first error of `make`.
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

/// Rows of the vocabulary that replace the base layer's, as trained by PEFT's `trainable_token_indices`.
#[derive(Clone, PartialEq, Debug)]
pub struct TokenRows<T = HostTensor> {
    /// The tokens, ascending, each once.
    pub ids: Vec<u32>,
    /// One row for each: `[ids, hidden]`.
    pub values: T,
}
