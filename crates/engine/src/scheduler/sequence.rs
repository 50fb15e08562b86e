//! One sequence, as far as scheduling goes.

use crate::adapters::AdapterId;
use crate::kv::{BlockId, Root};

/// What a sequence does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Several of its tokens, or its whole prompt, are uncomputed.
    Prefill,
    /// Only its last token is uncomputed, one that was generated.
    Decode,
}

/// A prompt and what was generated after it.
///
/// The first `computed` tokens have their keys and values in the KV cache.
#[derive(Debug)]
pub struct Sequence<T> {
    /// Prompt, then generated tokens.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt; at least one.
    pub prompt_len: usize,
    /// The length at which the sequence ends at the latest.
    pub max_len: usize,
    /// The adapter.
    pub adapter: Option<AdapterId>,
    /// Whether logits of every prompt position are wanted.
    pub all_logits: bool,
    /// What the owner keeps with it.
    pub data: T,
    pub(super) computed: usize,
    /// Prompt positions whose logits were computed, if they are wanted.
    pub(super) reported: usize,
    /// KV blocks held, in the order of positions.
    pub(super) blocks: Vec<BlockId>,
    /// Leading blocks that the prefix tree knows.
    pub(super) published: usize,
    /// Blocks set aside for tokens to come.
    pub(super) reserved: usize,
    /// Slot of the adapter, which is in use.
    pub(super) slot: Option<usize>,
    /// What keys and values depend on besides tokens; known while it runs.
    pub(super) root: Root,
    /// Later sequences that were admitted before it while it waited for its adapter.
    pub(super) overtaken: usize,
}

impl<T> Sequence<T> {
    /// A sequence that has computed and holds nothing yet.
    pub fn new(prompt: Vec<u32>, max_len: usize, adapter: Option<AdapterId>, data: T) -> Self {
        Self {
            prompt_len: prompt.len(),
            tokens: prompt,
            max_len,
            adapter,
            all_logits: false,
            data,
            computed: 0,
            reported: 0,
            blocks: Vec::new(),
            published: 0,
            reserved: 0,
            slot: None,
            root: None,
            overtaken: 0,
        }
    }

    /// Tokens known.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether no token is known, which the engine never lets happen.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens generated so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Tokens whose keys and values are cached.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// KV blocks held, in the order of positions.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Slot of its adapter while it runs.
    pub fn slot(&self) -> Option<usize> {
        self.slot
    }

    /// Later sequences that were admitted before it while it waited for its adapter.
    pub fn overtaken(&self) -> usize {
        self.overtaken
    }

    /// What it does next.
    pub fn phase(&self) -> Phase {
        let decodes = self.computed + 1 == self.len() && self.generated() > 0;
        if decodes { Phase::Decode } else { Phase::Prefill }
    }

    /// Row of the KV caches for a position.
    pub fn kv_slot(&self, position: usize, tokens_per_block: usize) -> usize {
        let block = self.blocks[position / tokens_per_block] as usize;
        block * tokens_per_block + position % tokens_per_block
    }

    /// First position from which on logits are wanted, if a step computes up to `end`.
    pub(super) fn logits_from(&self, end: usize) -> usize {
        let last = if end == self.len() { end - 1 } else { end };
        if self.lacks_logits() { last.min(self.reported.max(self.computed)) } else { last }
    }

    /// Tokens that may come from the cache: all but the last one, whose logits are wanted, or none
    /// where those of the prompt are.
    pub(super) fn reusable(&self) -> usize {
        if self.lacks_logits() { 0 } else { self.len() - 1 }
    }

    /// Whether logits of the prompt are wanted that were not computed yet.
    fn lacks_logits(&self) -> bool {
        self.all_logits && self.reported < self.prompt_len
    }
}
