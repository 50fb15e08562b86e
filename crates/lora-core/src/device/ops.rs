//! Argument structs of ops with many operands.

use bytemuck::{Pod, Zeroable};

use super::lora::LoraSite;
use super::{Backend, HostTensor, View, ViewMut};

/// Head counts and size of an attention layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeadDims {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head; even.
    pub head_dim: usize,
}

impl HeadDims {
    /// Columns of the queries.
    pub const fn q_cols(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of the keys, and of the values.
    pub const fn kv_cols(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// A low-rank update `scale * b a` of a weight, in host memory.
#[derive(Clone, Copy, Debug)]
pub struct HostUpdate<'a> {
    /// `[rank, in]`.
    pub a: &'a HostTensor,
    /// `[rows, rank]`.
    pub b: &'a HostTensor,
    /// Its factor.
    pub scale: f32,
}

/// The weight of an RMS norm. If a row's adapter has its own weight for this norm, that is used instead.
pub struct NormWeight<'a, B: Backend> {
    /// Weight of the base model: `[1, cols]` f32.
    pub base: View<'a, B>,
    /// Weights of adapters by slot, and the slot of each row; `None` if no row has an adapter.
    pub lora: Option<(&'a LoraSite<B>, &'a B::LoraPlan)>,
}

impl<B: Backend> Clone for NormWeight<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for NormWeight<'_, B> {}

impl<'a, B: Backend> From<View<'a, B>> for NormWeight<'a, B> {
    /// The base model's weight for every row.
    fn from(base: View<'a, B>) -> Self {
        Self { base, lora: None }
    }
}

/// Scales of a layer's KV cache, which holds keys and values divided by them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct KvScales {
    /// Scale of the keys; positive.
    pub k: f32,
    /// Scale of the values; positive.
    pub v: f32,
}

impl KvScales {
    /// Keys and values are stored unscaled.
    pub const ONE: Self = Self { k: 1.0, v: 1.0 };
}

/// Arguments of [`Backend::qk_norm_rope_append`].
///
/// For each row of `qkv` (`[rows, q_cols + 2 kv_cols]`): each head of q and k is RMS-normalised (if the model
/// has QK norms), rotated by its position (RoPE in the half-split form, Su et al., 2021) and stored in
/// place. Then k and v are written to the row's KV slot, divided by their scale and rounded to the dtype of
/// the caches, a float or e4m3 (saturating).
pub struct QkvArgs<'a, B: Backend> {
    /// Output of the fused projection; q and k are replaced.
    pub qkv: ViewMut<'a, B>,
    /// Extents.
    pub dims: HeadDims,
    /// QK norms: weights for heads of q and of k, each of `head_dim` columns, and the epsilon.
    pub norms: Option<(NormWeight<'a, B>, NormWeight<'a, B>, f32)>,
    /// Position of each row: `[1, rows]` i32.
    pub positions: View<'a, B>,
    /// `[max positions, head_dim]` f32: cosines of the half-dimensions, then their sines.
    pub cos_sin_table: View<'a, B>,
    /// Row of the caches that k and v of each row are written to: `[1, rows]` i32; -1 for none.
    pub kv_slots: View<'a, B>,
    /// Key cache of this layer: `[blocks * tokens_per_block, kv_cols]`.
    pub k_cache: ViewMut<'a, B>,
    /// Value cache of this layer, of the same shape.
    pub v_cache: ViewMut<'a, B>,
    /// Scales of the two.
    pub kv_scales: KvScales,
}

/// The rows of a step in host memory, for [`Backend::plan_attention`].
#[derive(Clone, Copy, Debug)]
pub struct AttentionRows<'a> {
    /// [`AttentionArgs::sequence_of_row`].
    pub sequences: &'a [i32],
    /// [`AttentionArgs::positions`]; as many.
    pub positions: &'a [i32],
    /// Entries of one block table.
    pub table_stride: usize,
}

/// Arguments of [`Backend::attention`].
///
/// Row `i` belongs to sequence `sequence_of_row[i]` at `positions[i]`. It attends to the positions
/// `0..=positions[i]` of that sequence, or to the last `window` of them. Position `p` of sequence `s` is
/// row `block_tables[s][p / tokens_per_block] * tokens_per_block + p % tokens_per_block` of the caches.
pub struct AttentionArgs<'a, B: Backend> {
    /// Queries: `[rows, heads * head_dim]`.
    pub queries: View<'a, B>,
    /// Extents.
    pub dims: HeadDims,
    /// Key cache: `[blocks * tokens_per_block, kv_cols]`.
    pub k_cache: View<'a, B>,
    /// Value cache, of the same shape.
    pub v_cache: View<'a, B>,
    /// Scales of the two, by which cached keys and values are multiplied.
    pub kv_scales: KvScales,
    /// Sequence of each row: `[1, rows]` i32.
    pub sequence_of_row: View<'a, B>,
    /// Position of each row: `[1, rows]` i32.
    pub positions: View<'a, B>,
    /// KV blocks of each sequence: `[sequences, max blocks]` i32.
    pub block_tables: View<'a, B>,
    /// Tokens of one KV block.
    pub tokens_per_block: usize,
    /// Scale of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Sliding window in tokens, including the row itself.
    pub window: Option<usize>,
    /// The plan that [`Backend::plan_attention`] made for these rows, if they were planned.
    pub plan: Option<&'a B::AttentionPlan>,
}

/// Sampling parameters of one row, as they are uploaded.
///
/// Order of application: bias, repetition, presence and frequency penalties, bans and mask, temperature,
/// top-k, top-p, min-p. A banned or masked token is never sampled and is ignored by the filters; if bans and
/// mask leave no token, some token of the vocabulary is sampled. `temperature == 0` or `top_k == 1` is
/// greedy, with the lowest id among equals. Otherwise the random number is the upper 24 bits of word 0 of
/// Philox4x32-10 (Salmon et al., 2011) with key `seed` and counter (`position`, `stream`, 0, 0). It selects
/// from the cumulative sum of the remaining probabilities in descending order, lower ids first among
/// equals. So the tokens of a request do not depend on the batch.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug, Pod, Zeroable)]
pub struct SampleRow {
    /// Temperature, by which logits are divided.
    pub temperature: f32,
    /// Top-p: the smallest set of most likely tokens whose probabilities reach this sum; 1 disables it.
    pub top_p: f32,
    /// Min-p: tokens with at least this fraction of the highest probability; 0 disables it.
    pub min_p: f32,
    /// Top-k: this many most likely tokens; 0 disables it.
    pub top_k: u32,
    /// Philox key, low and high word.
    pub seed: [u32; 2],
    /// Length of the sequence so far.
    pub position: u32,
    /// Number of this output among the request's `n`.
    pub stream: u32,
    /// Repetition penalty: positive logits of seen tokens are divided by it, negative ones multiplied (Keskar
    /// et al., 2019).
    pub repetition_penalty: f32,
    /// Presence penalty: subtracted once from the logit of a token that occurred.
    pub presence_penalty: f32,
    /// Frequency penalty: subtracted from the logit for each occurrence of the token.
    pub frequency_penalty: f32,
    /// First entry and number of entries of this row in [`SampleArgs::history`].
    pub history: [u32; 2],
    /// First entry and number of entries of this row in [`SampleArgs::banned`].
    pub banned: [u32; 2],
    /// First entry and number of entries of this row in [`SampleArgs::bias`].
    pub bias: [u32; 2],
    /// Row of [`SampleArgs::masks`] with the allowed tokens; -1 for all.
    pub mask: i32,
}

impl SampleRow {
    /// Number of 32-bit words of a row.
    pub const WORDS: usize = size_of::<Self>() / 4;

    /// The [`Self::mask`] of a row without a mask.
    pub const UNMASKED: i32 = -1;

    /// Greedy sampling from the raw logits.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        min_p: 0.0,
        top_k: 0,
        seed: [0; 2],
        position: 0,
        stream: 0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        history: [0; 2],
        banned: [0; 2],
        bias: [0; 2],
        mask: Self::UNMASKED,
    };
}

/// Arguments of [`Backend::sample`].
pub struct SampleArgs<'a, B: Backend> {
    /// `[rows, vocab]` f32; read only.
    pub logits: View<'a, B>,
    /// A [`SampleRow`] for each row: `[rows, SampleRow::WORDS]` i32.
    pub params: View<'a, B>,
    /// Seen tokens, and how often they count for presence and frequency: `[entries, 2]` i32.
    pub history: View<'a, B>,
    /// Banned tokens: `[1, entries]` i32.
    pub banned: View<'a, B>,
    /// Tokens, and the bits of the f32 that is added to their logits: `[entries, 2]` i32. A row has at most
    /// one entry for a token.
    pub bias: View<'a, B>,
    /// Bit sets of allowed tokens: `[masks, mask_words(vocab)]` i32. Token `t` is allowed if bit `t % 32` of
    /// word `t / 32` is 1; bits beyond the vocabulary are ignored.
    pub masks: View<'a, B>,
}

/// Words of a mask for a vocabulary of `vocab` tokens.
pub const fn mask_words(vocab: usize) -> usize {
    vocab.div_ceil(32)
}

/// Arguments of [`Backend::logprobs`]: log-softmax of the raw logits, before any penalty.
pub struct LogprobArgs<'a, B: Backend> {
    /// `[rows, vocab]` f32.
    pub logits: View<'a, B>,
    /// The token of each row whose log-probability is asked for: `[1, rows]` i32.
    pub targets: View<'a, B>,
}

/// Results of [`Backend::logprobs`]. `k` is the number of columns of `top_ids`.
pub struct LogprobOut<'a, B: Backend> {
    /// Log-probability of the target: `[1, rows]` f32.
    pub target: ViewMut<'a, B>,
    /// 1 + number of tokens more likely than the target: `[1, rows]` i32.
    pub rank: ViewMut<'a, B>,
    /// The most likely tokens, best first, lower ids first among equals: `[rows, k]` i32.
    pub top_ids: ViewMut<'a, B>,
    /// Their log-probabilities: `[rows, k]` f32.
    pub top: ViewMut<'a, B>,
}
