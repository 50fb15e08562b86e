//! A site: one base projection, and what each resident adapter does to it.

use std::ops::Range;

use crate::device::{Backend, HostTensor};

/// What the base layer of a site does with its input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SiteKind {
    /// Multiplies it by a matrix `[out, in]`.
    Linear,
    /// Looks a row up in a table `[in, out]`; the input is the one-hot row of a token id.
    Embedding,
    /// Scales by the weight of an RMS norm, `[in]`; an adapter can only replace it.
    Norm,
}

/// Kind and extents of a site.
///
/// A fused projection (q, k, v; gate, up) is one site with several slices, so that one op serves
/// the modules that share an input.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SiteSpec {
    /// What the base layer does.
    pub kind: SiteKind,
    /// Columns of the input; the vocabulary for an embedding.
    pub in_dim: usize,
    /// Columns of the output that each module owns, in order and without gaps.
    pub slices: Vec<Range<usize>>,
}

impl SiteSpec {
    /// A projection whose modules have these output widths, side by side.
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
/// For a row `x` whose adapter sits in slot `s`, each slice of the base output `y` becomes
/// `gain * (y + scale * B (A x)) + shift`; where the adapter replaces the matrix, `W x` stands for
/// `y`, and where it replaces rows of the vocabulary, so do they for the tokens that they belong to.
/// The parts an adapter does not have drop out: no `gain` (DoRA) means 1, no `shift` (biases)
/// means 0, no low rank means no product. `scale` is kept apart from `B`.
pub struct LoraSite<B: Backend> {
    /// Extents.
    pub spec: SiteSpec,
    /// The adapters, by slot.
    pub table: B::LoraTable,
}

/// The low-rank product of one adapter at one slice.
#[derive(Clone, Debug)]
pub struct SlotLowRank {
    /// `A`: `[rank, in]`, float.
    pub a: HostTensor,
    /// `B`: `[out, rank]`, float.
    pub b: HostTensor,
    /// Factor of the product, `alpha / rank` or `alpha / sqrt(rank)`.
    pub scale: f32,
}

/// Rows of an adapter's own for some tokens of the vocabulary: rows of an embedding's table, or of a
/// matrix whose outputs are logits.
#[derive(Clone, Debug)]
pub struct SlotRows {
    /// The tokens, ascending, each once.
    pub ids: Vec<u32>,
    /// A row for each of them, float: `[ids, out]` for an embedding, else `[ids, in]`.
    pub values: HostTensor,
}

/// What one adapter does to one slice of a site; see [`LoraSite`] for the formula.
#[derive(Clone, Debug, Default)]
pub struct SlotSlice {
    /// The low-rank product.
    pub low_rank: Option<SlotLowRank>,
    /// Factor of each output, `[out]`.
    pub gain: Option<Vec<f32>>,
    /// Summand of each output, `[out]`.
    pub shift: Option<Vec<f32>>,
    /// What takes the base layer's place: a matrix `[out, in]`, for an embedding a table `[in, out]`,
    /// for a norm a weight `[in]` in f32.
    pub replacement: Option<HostTensor>,
    /// Rows that take the place of the base layer's; only at sites of one slice, and not beside a
    /// replacement.
    pub rows: Option<SlotRows>,
}
