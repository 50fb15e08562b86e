//! Named arguments of the ops that take many.

use bytemuck::{Pod, Zeroable};

use super::lora::LoraSite;
use super::{Backend, View, ViewMut};

/// Extents of an attention layer.
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

/// The weight of an RMS norm. Rows whose adapter has a weight of its own for this norm are scaled by
/// that one.
pub struct NormWeight<'a, B: Backend> {
    /// The base model's: `[1, cols]` f32.
    pub base: View<'a, B>,
    /// Weights of adapters, by slot, and the slot of each row; `None` where no row has an adapter.
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

/// Scales of a layer's KV cache: it holds keys and values divided by them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct KvScales {
    /// Of the keys; positive.
    pub k: f32,
    /// Of the values; positive.
    pub v: f32,
}

impl KvScales {
    /// Keys and values as they are.
    pub const ONE: Self = Self { k: 1.0, v: 1.0 };
}

/// Arguments of [`Backend::qk_norm_rope_append`].
///
/// For each row of `qkv` (`[rows, q_cols + 2 kv_cols]`): each head of q and k is RMS-normalised
/// (where the model has such norms), then rotated by its position (half-split form of Su et al.,
/// 2021) and stored back in place; then k and v go to the row's KV slot, divided by their scale and
/// rounded to the caches' dtype, a float or e4m3 (which saturates).
pub struct QkvArgs<'a, B: Backend> {
    /// Output of the fused projection; its q and k parts are replaced.
    pub qkv: ViewMut<'a, B>,
    /// Extents.
    pub dims: HeadDims,
    /// RMS-norm weights of q heads and k heads, each of `head_dim` columns, and their epsilon.
    pub norms: Option<(NormWeight<'a, B>, NormWeight<'a, B>, f32)>,
    /// Position of each row: `[1, rows]` i32.
    pub positions: View<'a, B>,
    /// `[max positions, head_dim]` f32: cosines of the half-dimensions, then their sines.
    pub cos_sin_table: View<'a, B>,
    /// Row of the caches that each row's k and v go to: `[1, rows]` i32; -1 stores nothing.
    pub kv_slots: View<'a, B>,
    /// Key cache of this layer: `[blocks * tokens_per_block, kv_cols]`.
    pub k_cache: ViewMut<'a, B>,
    /// Value cache of this layer, of the same shape.
    pub v_cache: ViewMut<'a, B>,
    /// Scales of the two.
    pub kv_scales: KvScales,
}

/// The rows of a step as the host knows them, for [`Backend::plan_attention`].
#[derive(Clone, Copy, Debug)]
pub struct AttentionRows<'a> {
    /// [`AttentionArgs::sequence_of_row`].
    pub sequences: &'a [i32],
    /// [`AttentionArgs::positions`], as many.
    pub positions: &'a [i32],
    /// Entries from one block table to the next.
    pub table_stride: usize,
}

/// Arguments of [`Backend::attention`].
///
/// Row `i` belongs to sequence `sequence_of_row[i]` and stands at `positions[i]`; it attends to
/// that sequence's positions `0..=positions[i]`, or to the last `window` of them. Position `p` of a
/// sequence lies in row `block_tables[s][p / tokens_per_block] * tokens_per_block +
/// p % tokens_per_block` of the caches.
pub struct AttentionArgs<'a, B: Backend> {
    /// Queries: `[rows, heads * head_dim]`.
    pub queries: View<'a, B>,
    /// Extents.
    pub dims: HeadDims,
    /// Key cache: `[blocks * tokens_per_block, kv_cols]`.
    pub k_cache: View<'a, B>,
    /// Value cache, of the same shape.
    pub v_cache: View<'a, B>,
    /// Scales of the two: what they hold is multiplied by them.
    pub kv_scales: KvScales,
    /// Sequence of each row: `[1, rows]` i32.
    pub sequence_of_row: View<'a, B>,
    /// Position of each row: `[1, rows]` i32.
    pub positions: View<'a, B>,
    /// KV blocks of each sequence: `[sequences, max blocks]` i32.
    pub block_tables: View<'a, B>,
    /// Tokens of one KV block.
    pub tokens_per_block: usize,
    /// Factor of the scores, `1 / sqrt(head_dim)` as a rule.
    pub scale: f32,
    /// Sliding window in tokens, the row itself included.
    pub window: Option<usize>,
    /// What [`Backend::plan_attention`] made of these rows; without it, the host knows nothing of them.
    pub plan: Option<&'a B::AttentionPlan>,
}

/// How to draw one row's token; the wire form of a request's sampling parameters.
///
/// Order of application: bias, repetition, presence and frequency penalty, bans and mask, temperature,
/// top-k, top-p, min-p. A token that is banned or masked out is never drawn, whatever the filters
/// are, and does not count for them; where bans and mask together leave none, some token of the
/// vocabulary is drawn. `temperature == 0` or `top_k == 1` takes the likeliest token, the lowest id among
/// equals. Otherwise the draw is the upper 24 bits of word 0 of Philox4x32-10 (Salmon et al., 2011)
/// with key `seed` and counter (`position`, `stream`, 0, 0), as a fraction of the kept tokens' sum,
/// walked in order of descending probability, lower ids first among equals. So a request's tokens do
/// not depend on the batch it shares.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug, Pod, Zeroable)]
pub struct SampleRow {
    /// Divides the logits.
    pub temperature: f32,
    /// Keep the smallest set of likeliest tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this fraction of the likeliest token's probability; 0 keeps all.
    pub min_p: f32,
    /// Keep this many likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Key of the random numbers, low and high word.
    pub seed: [u32; 2],
    /// Tokens of the sequence so far.
    pub position: u32,
    /// Number of this output among the request's `n`.
    pub stream: u32,
    /// Positive logits of seen tokens are divided by it, negative ones multiplied (Keskar et al., 2019).
    pub repetition_penalty: f32,
    /// Taken once from the logit of a token that counts.
    pub presence_penalty: f32,
    /// Taken from the logit for each time that the token counts.
    pub frequency_penalty: f32,
    /// First entry and number of entries of this row in [`SampleArgs::history`].
    pub history: [u32; 2],
    /// First entry and number of entries of this row in [`SampleArgs::banned`].
    pub banned: [u32; 2],
    /// First entry and number of entries of this row in [`SampleArgs::bias`].
    pub bias: [u32; 2],
    /// Row of [`SampleArgs::masks`] that says which tokens may be drawn; -1 for all.
    pub mask: i32,
}

impl SampleRow {
    /// Number of 32-bit words of a row.
    pub const WORDS: usize = size_of::<Self>() / 4;

    /// The [`Self::mask`] of a row that may draw any token.
    pub const UNMASKED: i32 = -1;

    /// Takes the likeliest token of the raw logits.
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
    /// Seen tokens with how often they count for presence and frequency: `[entries, 2]` i32.
    pub history: View<'a, B>,
    /// Tokens that must not be drawn: `[1, entries]` i32.
    pub banned: View<'a, B>,
    /// Tokens with what is added to their logits, as the bits of an f32: `[entries, 2]` i32. A row has
    /// at most one entry for a token.
    pub bias: View<'a, B>,
    /// Sets of tokens that rows point at: `[masks, mask_words(vocab)]` i32. Token `t` is in a set if
    /// bit `t % 32` of word `t / 32` is 1; bits behind the vocabulary mean nothing.
    pub masks: View<'a, B>,
}

/// Columns of [`SampleArgs::masks`] for a vocabulary of `vocab` tokens.
pub const fn mask_words(vocab: usize) -> usize {
    vocab.div_ceil(32)
}

/// Arguments of [`Backend::logprobs`]: log-softmax of the raw logits, before any penalty.
pub struct LogprobArgs<'a, B: Backend> {
    /// `[rows, vocab]` f32.
    pub logits: View<'a, B>,
    /// The token of each row to report: `[1, rows]` i32.
    pub targets: View<'a, B>,
}

/// Results of [`Backend::logprobs`]. `k` is the number of columns of `top_ids`.
pub struct LogprobOut<'a, B: Backend> {
    /// Log-probability of the target: `[1, rows]` f32.
    pub target: ViewMut<'a, B>,
    /// 1 + number of tokens likelier than the target: `[1, rows]` i32.
    pub rank: ViewMut<'a, B>,
    /// The likeliest tokens, best first, lower ids first among equals: `[rows, k]` i32.
    pub top_ids: ViewMut<'a, B>,
    /// Their log-probabilities: `[rows, k]` f32.
    pub top: ViewMut<'a, B>,
}
