//! What an adapter holds for one site: a low-rank update, and weights that replace the model's.

use std::convert::Infallible;

use crate::device::HostTensor;

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

/// Rows of the vocabulary that take the place of the base layer's, as PEFT's
/// `trainable_token_indices` trains them.
#[derive(Clone, PartialEq, Debug)]
pub struct TokenRows<T = HostTensor> {
    /// The tokens, ascending, each once.
    pub ids: Vec<u32>,
    /// A row for each of them: `[ids, hidden]`.
    pub values: T,
}
