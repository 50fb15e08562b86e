//! Block management of the paged KV cache: allocation to sequences, and prefix reuse across them.

use super::pool::{BlockId, BlockPool};
use super::prefix::{PrefixTree, Root};

/// Size and reuse settings of a KV cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvPlan {
    /// Number of blocks.
    pub blocks: usize,
    /// Tokens per block.
    pub tokens_per_block: usize,
    /// Whether sequences with equal prefixes share blocks.
    pub reuse: bool,
    /// Whether the first tokens of a block are reused where the whole block does not match, by a copy.
    pub partial_reuse: bool,
}

/// A copy of the keys and values of a block's first tokens to another block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockCopy {
    /// Block to read.
    pub from: BlockId,
    /// Block to write.
    pub to: BlockId,
    /// How many tokens to copy.
    pub tokens: usize,
}

/// Blocks allocated to a newly admitted sequence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opening {
    /// Its blocks, enough for all tokens that were asked for.
    pub blocks: Vec<BlockId>,
    /// Leading tokens whose keys and values are cached.
    pub cached: usize,
    /// How many leading blocks are in the prefix tree.
    pub shared: usize,
    /// A copy to carry out before the next step, on which `cached` relies.
    pub copy: Option<BlockCopy>,
}

/// Counts of prefix reuse.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PrefixStats {
    /// Tokens of admitted sequences that were looked up.
    pub queried_tokens: u64,
    /// Tokens of them that were found.
    pub hit_tokens: u64,
}

/// Allocates KV blocks and reuses the blocks of known prefixes.
#[derive(Debug)]
pub struct KvBlocks {
    plan: KvPlan,
    pool: BlockPool,
    tree: PrefixTree,
    stats: PrefixStats,
}

impl KvBlocks {
    /// An empty cache.
    pub fn new(plan: KvPlan) -> Self {
        Self {
            pool: BlockPool::new(plan.blocks, plan.tokens_per_block),
            tree: PrefixTree::new(plan.tokens_per_block),
            stats: PrefixStats::default(),
            plan,
        }
    }

    /// Size and reuse settings.
    pub fn plan(&self) -> KvPlan {
        self.plan
    }

    /// Number of blocks that `tokens` tokens need.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        self.pool.blocks_for(tokens)
    }

    /// Blocks that can be allocated: free ones, and cached prefixes that no sequence holds.
    pub fn available(&self) -> usize {
        self.pool.free() + self.tree.unheld()
    }

    /// Blocks held by sequences.
    pub fn held(&self) -> usize {
        self.pool.total() - self.available()
    }

    /// Counts of prefix reuse.
    pub fn stats(&self) -> PrefixStats {
        self.stats
    }

    /// Allocates blocks for `tokens`, the present tokens of a sequence. Of these, up to `reusable` leading
    /// tokens are looked up in the prefix tree. At least `spare` blocks must stay available: they are
    /// reserved for running sequences.
    ///
    /// Returns `None`, without any change, if too few blocks are available.
    pub fn open(
        &mut self,
        root: Root,
        tokens: &[u32],
        reusable: usize,
        spare: usize,
    ) -> Option<Opening> {
        let reusable = if self.plan.reuse { &tokens[..reusable] } else { &[] };
        let found = self.tree.find(root, reusable, self.plan.partial_reuse);
        let idle = found.blocks.iter().filter(|block| self.pool.is_unheld(**block)).count();
        let fresh = self.blocks_for(tokens.len()) - found.blocks.len();
        if self.available() < fresh + idle + spare {
            return None;
        }
        for block in &found.blocks {
            self.hold(*block);
        }
        let shared = found.blocks.len();
        let mut blocks = found.blocks;
        // This may evict the source of the copy. Its contents stay valid: the copy runs before any step
        // writes to the block.
        blocks.extend((0..fresh).map_while(|_| self.take()));
        let copy = found.partial.and_then(|(from, tokens)| {
            blocks.get(shared).map(|to| BlockCopy { from, to: *to, tokens })
        });
        let cached = shared * self.plan.tokens_per_block + copy.map_or(0, |copy| copy.tokens);
        self.stats.queried_tokens += reusable.len() as u64;
        self.stats.hit_tokens += cached as u64;
        Some(Opening { blocks, cached, shared, copy })
    }

    /// Allocates a block, evicting a cached one that no sequence holds if necessary.
    pub fn take(&mut self) -> Option<BlockId> {
        self.pool.take().or_else(|| {
            let evicted = self.tree.evict()?;
            self.pool.put_back(evicted);
            self.pool.take()
        })
    }

    /// Adds `blocks[index]`, a full block that holds `tokens`, to the prefix tree. All blocks before it
    /// must be in the tree. If the tree already has a block with the same contents, the sequence uses that
    /// one instead, and this one is freed.
    pub fn publish(&mut self, root: Root, blocks: &mut [BlockId], index: usize, tokens: &[u32]) {
        if !self.plan.reuse {
            return;
        }
        let before = index.checked_sub(1).map(|before| blocks[before]);
        if let Some(twin) = self.tree.insert(root, before, tokens, blocks[index]) {
            self.hold(twin);
            self.release_one(blocks[index]);
            blocks[index] = twin;
        }
    }

    /// Adds `blocks[index]`, the partly filled last block of a sequence, which holds `tokens`, to the prefix
    /// tree. Nothing may be written to it from now on.
    pub fn insert_partial(&mut self, root: Root, blocks: &[BlockId], index: usize, tokens: &[u32]) {
        if self.plan.reuse && self.plan.partial_reuse {
            let before = index.checked_sub(1).map(|before| blocks[before]);
            self.tree.insert_partial(root, before, tokens, blocks[index]);
        }
    }

    /// Releases a sequence's blocks, last one first, as [`PrefixTree::release`] requires.
    pub fn close(&mut self, blocks: Vec<BlockId>) {
        for block in blocks.into_iter().rev() {
            self.release_one(block);
        }
    }

    fn hold(&mut self, block: BlockId) {
        if self.pool.hold(block) {
            self.tree.hold(block);
        }
    }

    fn release_one(&mut self, block: BlockId) {
        if !self.pool.release(block) {
            return;
        }
        if self.tree.contains(block) {
            self.tree.release(block);
        } else {
            self.pool.put_back(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(blocks: usize) -> KvBlocks {
        KvBlocks::new(KvPlan { blocks, tokens_per_block: 2, reuse: true, partial_reuse: true })
    }

    /// Opens a sequence, publishes its full blocks, and closes it.
    fn run(cache: &mut KvBlocks, tokens: &[u32]) -> Opening {
        let opening = cache.open(None, tokens, tokens.len() - 1, 0).unwrap();
        let mut blocks = opening.blocks.clone();
        for (i, chunk) in tokens.chunks_exact(2).enumerate().skip(opening.shared) {
            cache.publish(None, &mut blocks, i, chunk);
        }
        cache.close(blocks);
        opening
    }

    #[test]
    fn a_closed_sequence_leaves_its_prefix_cached_and_holds_no_block() {
        let mut cache = cache(4);
        assert_eq!(run(&mut cache, &[1, 2, 3, 4, 5]).cached, 0);
        assert_eq!((cache.held(), cache.available()), (0, 4));
        let again = run(&mut cache, &[1, 2, 3, 4, 5]);
        assert_eq!((again.cached, again.shared, again.copy), (4, 2, None));
        // The last token is always computed, as its logits are needed, so its block is copied.
        let whole = run(&mut cache, &[1, 2, 3, 4]);
        assert_eq!((whole.cached, whole.shared), (3, 1));
        assert_eq!(whole.copy.map(|copy| copy.tokens), Some(1));
        assert_eq!(cache.stats(), PrefixStats { queried_tokens: 11, hit_tokens: 7 });
    }

    #[test]
    fn prefixes_are_evicted_for_sequences_that_need_blocks() {
        let mut cache = cache(2);
        run(&mut cache, &[1, 2, 3]);
        let other = cache.open(None, &[7, 8, 9, 10], 3, 0).unwrap();
        assert_eq!((other.blocks.len(), cache.available()), (2, 0));
        assert_eq!(cache.open(None, &[7], 0, 0), None);
        cache.close(other.blocks);
        assert_eq!(cache.available(), 2);
    }

    #[test]
    fn spare_blocks_are_not_allocated() {
        let mut cache = cache(3);
        assert_eq!(cache.open(None, &[1, 2, 3], 2, 2), None);
        assert!(cache.open(None, &[1, 2, 3], 2, 1).is_some());
    }

    #[test]
    fn sequences_that_computed_the_same_block_share_one() {
        let mut cache = cache(4);
        let (a, b) = (cache.open(None, &[1, 2], 1, 0), cache.open(None, &[1, 2], 1, 0));
        let (mut a, mut b) = (a.unwrap().blocks, b.unwrap().blocks);
        cache.publish(None, &mut a, 0, &[1, 2]);
        cache.publish(None, &mut b, 0, &[1, 2]);
        assert_eq!((&a, cache.held()), (&b, 1));
        cache.close(a);
        cache.close(b);
        assert_eq!((cache.held(), cache.available()), (0, 4));
    }
}
