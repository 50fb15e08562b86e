//! A site: one base projection, and the adapters that are resident for it.

use std::ops::Range;

use crate::device::{Backend, HostTensor};

/// The kind of a site's base layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SiteKind {
    /// A linear layer `[out, in]`.
    Linear,
    /// A token embedding, a table `[in, out]`; the input is the one-hot row of a token id.
    Embedding,
    /// An RMS norm with a weight `[in]`, which an adapter can only replace.
    Norm,
}

/// Kind and dimensions of a site.
///
/// A fused projection (qkv; gate and up) is one site with several slices, so that one op handles all modules
/// that share an input.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SiteSpec {
    /// Kind of the base layer.
    pub kind: SiteKind,
    /// Columns of the input; the vocabulary for an embedding.
    pub in_dim: usize,
    /// Output columns of each module, in order and without gaps.
    pub slices: Vec<Range<usize>>,
}

impl SiteSpec {
    /// A projection with modules of these output widths, side by side.
    pub fn linear(in_dim: usize, widths: &[usize]) -> Self {
        let mut end = 0;
        let slices = widths
            .iter()
            .map(|width| {
                let start = end;
                end += width;
                start..end
            })
            .collect();
        Self { kind: SiteKind::Linear, in_dim, slices }
    }

    /// A token embedding.
    pub fn embedding(vocab: usize, hidden: usize) -> Self {
        let slices = std::iter::once(0..hidden).collect();
        Self { kind: SiteKind::Embedding, in_dim: vocab, slices }
    }

    /// An RMS norm of `cols` columns.
    pub fn norm(cols: usize) -> Self {
        Self { kind: SiteKind::Norm, in_dim: cols, slices: std::iter::once(0..cols).collect() }
    }

    /// Columns of the whole output.
    pub fn out_dim(&self) -> usize {
        self.slices.last().map_or(0, |s| s.end)
    }
}

/// One base projection and the adapters resident for it.
///
/// For a row `x` with an adapter, each slice of the base output `y` becomes
/// `gain * (y + scale * B (A x)) + shift`. If the adapter replaces the matrix, `y` is `W x` instead; if it
/// replaces rows of the vocabulary, it is that for their tokens. Without `gain` (DoRA) it is 1, without
/// `shift` (biases) it is 0. `scale` is not folded into `B`.
pub struct LoraSite<B: Backend> {
    /// Extents.
    pub spec: SiteSpec,
    /// The adapters, by slot.
    pub table: B::LoraTable,
}

/// The low-rank factors of one adapter for one slice.
#[derive(Clone, Debug)]
pub struct SlotLowRank {
    /// `A`: `[rank, in]`, float.
    pub a: HostTensor,
    /// `B`: `[out, rank]`, float.
    pub b: HostTensor,
    /// Scale of the product, `alpha / rank` or `alpha / sqrt(rank)`.
    pub scale: f32,
}

/// An adapter's own rows for some tokens, in place of rows of the embedding or of `lm_head`.
#[derive(Clone, Debug)]
pub struct SlotRows {
    /// The tokens, ascending, each once.
    pub ids: Vec<u32>,
    /// One row for each, float: `[ids, out]` for an embedding, else `[ids, in]`.
    pub values: HostTensor,
}

/// The part of an adapter for one slice of a site; see [`LoraSite`] for the formula.
#[derive(Clone, Debug, Default)]
pub struct SlotSlice {
    /// The low-rank product.
    pub low_rank: Option<SlotLowRank>,
    /// Multiplies each output, `[out]`.
    pub gain: Option<Vec<f32>>,
    /// Added to each output, `[out]`.
    pub shift: Option<Vec<f32>>,
    /// Replaces the weight of the base layer: a matrix `[out, in]`, for an embedding a table `[in, out]`,
    /// for a norm a weight `[in]` in f32.
    pub replacement: Option<HostTensor>,
    /// Replaces rows of the base layer; only at sites with one slice, and not together with a replacement.
    pub rows: Option<SlotRows>,
}
