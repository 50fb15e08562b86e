//! The free list of KV blocks.

/// Hands out KV blocks and takes them back. A block is a number below the pool's size; the memory
/// behind it belongs to the model's KV cache.
#[derive(Debug)]
pub struct BlockPool {
    free: Vec<u32>,
    total: usize,
    tokens_per_block: usize,
}

impl BlockPool {
    /// A pool of `total` free blocks.
    pub fn new(total: usize, tokens_per_block: usize) -> Self {
        // Low numbers are handed out first, so that a small load touches little memory.
        Self { free: (0..total as u32).rev().collect(), total, tokens_per_block }
    }

    /// Blocks that a sequence of `tokens` tokens needs.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.tokens_per_block)
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Blocks that nobody holds.
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// Tokens of one block.
    pub fn tokens_per_block(&self) -> usize {
        self.tokens_per_block
    }

    /// Takes `count` blocks, or none at all if there are fewer.
    pub fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        let keep = self.free.len().checked_sub(count)?;
        Some(self.free.split_off(keep))
    }

    /// Takes blocks back.
    pub fn give(&mut self, blocks: Vec<u32>) {
        self.free.extend(blocks);
        debug_assert!(self.free.len() <= self.total, "a block was given back twice");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_taken_all_or_none() {
        let mut pool = BlockPool::new(3, 32);
        assert_eq!(pool.blocks_for(33), 2);
        let two = pool.take(2).unwrap();
        assert_eq!((pool.take(2), pool.available()), (None, 1));
        pool.give(two);
        assert_eq!(pool.available(), pool.total());
    }
}
