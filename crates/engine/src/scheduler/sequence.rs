//! A sequence as the scheduler sees it.

use crate::adapters::AdapterId;
use crate::kv::{BlockId, Root};

/// Phase of a sequence in its next step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Part of its prompt is not computed, or several tokens after a preemption.
    Prefill,
    /// Only its last token, a generated one, is not computed.
    Decode,
}

/// A prompt and its generated tokens. The keys and values of the first `computed` tokens are in the KV
/// cache.
#[derive(Debug)]
pub struct Sequence<T> {
    /// The prompt, then the generated tokens.
    pub tokens: Vec<u32>,
    /// Length of the prompt; at least 1.
    pub prompt_len: usize,
    /// Maximum length of prompt and generated tokens together.
    pub max_len: usize,
    /// Its adapter; `None`: the base model.
    pub adapter: Option<AdapterId>,
    /// Whether the logits of every prompt position are needed, for prompt log-probabilities or context
    /// logits.
    pub all_logits: bool,
    /// Data of the caller, which the scheduler does not look at.
    pub data: T,
    pub(super) computed: usize,
    /// With `all_logits`: positions whose logits were computed. Unlike `computed`, it survives preemption.
    pub(super) reported: usize,
    /// KV blocks in order of positions.
    pub(super) blocks: Vec<BlockId>,
    /// How many leading blocks are in the prefix tree.
    pub(super) published: usize,
    /// Blocks reserved for tokens to come ([`CapacityPolicy::GuaranteedNoEvict`](super::CapacityPolicy)).
    pub(super) reserved: usize,
    /// Slot of its adapter while it runs.
    pub(super) slot: Option<usize>,
    /// Content of its adapter while it runs, on which keys and values depend besides the tokens.
    pub(super) root: Root,
    /// How often it was overtaken while it waited for its adapter.
    pub(super) overtaken: usize,
}

impl<T> Sequence<T> {
    /// A new sequence, with nothing computed and no blocks.
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

    /// Number of prompt and generated tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether it has no tokens; never true in the engine.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Number of generated tokens.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Number of tokens whose keys and values are in the KV cache.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// KV blocks in order of positions.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Slot of its adapter while it runs.
    pub fn slot(&self) -> Option<usize> {
        self.slot
    }

    /// How often it was overtaken while it waited for its adapter.
    pub fn overtaken(&self) -> usize {
        self.overtaken
    }

    /// Phase of its next step.
    pub fn phase(&self) -> Phase {
        let decodes = self.computed + 1 == self.len() && self.generated() > 0;
        if decodes { Phase::Decode } else { Phase::Prefill }
    }

    /// Row of a position in the KV caches.
    pub fn kv_slot(&self, position: usize, tokens_per_block: usize) -> usize {
        let block = self.blocks[position / tokens_per_block] as usize;
        block * tokens_per_block + position % tokens_per_block
    }

    /// First position of a step up to `end` whose logits are needed; `end` if none.
    pub(super) fn logits_from(&self, end: usize) -> usize {
        let last = if end == self.len() { end - 1 } else { end };
        if self.lacks_logits() { last.min(self.reported.max(self.computed)) } else { last }
    }

    /// How many leading tokens may be reused from the KV cache: all but the last one, whose logits are
    /// needed; none if the logits of the prompt are needed.
    pub(super) fn reusable(&self) -> usize {
        if self.lacks_logits() { 0 } else { self.len() - 1 }
    }

    /// Whether logits of the prompt are needed that were not computed yet.
    fn lacks_logits(&self) -> bool {
        self.all_logits && self.reported < self.prompt_len
    }
}
