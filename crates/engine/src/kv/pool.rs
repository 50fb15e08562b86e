//! Reference counts of KV blocks, and the list of free ones.

/// Index of a KV block in [`crate::model::KvCache`].
pub type BlockId = u32;

/// Allocates KV blocks and counts the sequences that hold each.
#[derive(Debug)]
pub struct BlockPool {
    free: Vec<BlockId>,
    /// Number of holders of each block.
    holders: Vec<u32>,
    tokens_per_block: usize,
}

impl BlockPool {
    /// A pool of `total` free blocks.
    pub fn new(total: usize, tokens_per_block: usize) -> Self {
        // Low indices are allocated first, so that a small load touches little memory.
        let free = (0..total as BlockId).rev().collect();
        Self { free, holders: vec![0; total], tokens_per_block }
    }

    /// Number of blocks that `tokens` tokens need.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.tokens_per_block)
    }

    /// Number of blocks.
    pub fn total(&self) -> usize {
        self.holders.len()
    }

    /// Number of free blocks. Blocks of cached prefixes are not among them, even if they have no holder.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Tokens per block.
    pub fn tokens_per_block(&self) -> usize {
        self.tokens_per_block
    }

    /// Allocates a free block, with one holder.
    pub fn take(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.holders[block as usize] = 1;
        Some(block)
    }

    /// Adds a holder. Returns whether it is the first.
    pub fn hold(&mut self, block: BlockId) -> bool {
        let holders = &mut self.holders[block as usize];
        *holders += 1;
        *holders == 1
    }

    /// Removes a holder. Returns whether it was the last. The block becomes free only by
    /// [`BlockPool::put_back`], as it may stay cached as a prefix.
    pub fn release(&mut self, block: BlockId) -> bool {
        let holders = &mut self.holders[block as usize];
        debug_assert!(*holders > 0, "KV block {block} was released twice");
        *holders = holders.saturating_sub(1);
        *holders == 0
    }

    /// Whether a block has no holder.
    pub fn is_unheld(&self, block: BlockId) -> bool {
        self.holders[block as usize] == 0
    }

    /// Makes a block without holders free.
    pub fn put_back(&mut self, block: BlockId) {
        debug_assert!(self.is_unheld(block), "KV block {block} is still held");
        self.free.push(block);
        debug_assert!(self.free.len() <= self.total(), "a KV block was put back twice");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_free_again_after_its_last_holder() {
        let mut pool = BlockPool::new(2, 32);
        assert_eq!(pool.blocks_for(33), 2);
        let block = pool.take().unwrap();
        assert!(!pool.hold(block));
        assert!(!pool.release(block));
        assert!(pool.release(block) && pool.is_unheld(block));
        assert_eq!(pool.free(), 1);
        pool.put_back(block);
        assert_eq!(pool.free(), pool.total());
    }
}
