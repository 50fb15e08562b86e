//! One sequence, as far as scheduling goes.

use lora_core::Generation;

/// What a sequence does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Part of its prompt is uncomputed.
    Prefill,
    /// Its last token is uncomputed.
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
    /// Tokens whose keys and values are cached.
    pub computed: usize,
    /// The length at which the sequence ends at the latest.
    pub max_len: usize,
    /// The adapter, by content.
    pub adapter: Option<Generation>,
    /// Whether logits of every prompt position are wanted.
    pub all_logits: bool,
    /// KV blocks held, in the order of positions.
    pub blocks: Vec<u32>,
    /// Slot pinned.
    pub slot: Option<usize>,
    /// What the owner keeps with it.
    pub data: T,
}

impl<T> Sequence<T> {
    /// A sequence that has computed and holds nothing yet.
    pub fn new(prompt: Vec<u32>, max_len: usize, adapter: Option<Generation>, data: T) -> Self {
        Self {
            prompt_len: prompt.len(),
            tokens: prompt,
            computed: 0,
            max_len,
            adapter,
            all_logits: false,
            blocks: Vec::new(),
            slot: None,
            data,
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

    /// What it does next.
    pub fn phase(&self) -> Phase {
        if self.computed < self.prompt_len { Phase::Prefill } else { Phase::Decode }
    }

    /// Row of the KV caches for a position.
    pub fn kv_slot(&self, position: usize, tokens_per_block: usize) -> usize {
        let block = self.blocks[position / tokens_per_block] as usize;
        block * tokens_per_block + position % tokens_per_block
    }
}
