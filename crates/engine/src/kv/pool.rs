//! The KV blocks: who holds them, and which are free.

/// Number of a KV block; the memory behind it belongs to the model's KV cache.
pub type BlockId = u32;

/// Hands out KV blocks and counts their holders.
#[derive(Debug)]
pub struct BlockPool {
    free: Vec<BlockId>,
    /// Holders of each block.
    holders: Vec<u32>,
    tokens_per_block: usize,
}

impl BlockPool {
    /// A pool of `total` free blocks.
    pub fn new(total: usize, tokens_per_block: usize) -> Self {
        // Low numbers are handed out first, so that a small load touches little memory.
        let free = (0..total as BlockId).rev().collect();
        Self { free, holders: vec![0; total], tokens_per_block }
    }

    /// Blocks that `tokens` tokens need.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.tokens_per_block)
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.holders.len()
    }

    /// Blocks without a holder and without contents worth keeping.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Tokens of one block.
    pub fn tokens_per_block(&self) -> usize {
        self.tokens_per_block
    }

    /// Takes a free block; the caller is its first holder.
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

    /// Takes a holder away. Returns whether it was the last; the block is then not free yet: see
    /// [`BlockPool::put_back`].
    pub fn release(&mut self, block: BlockId) -> bool {
        let holders = &mut self.holders[block as usize];
        debug_assert!(*holders > 0, "KV block {block} was released twice");
        *holders = holders.saturating_sub(1);
        *holders == 0
    }

    /// Whether nobody holds a block.
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
