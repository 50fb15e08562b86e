//! Simulated memory, of which only the size is tracked.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{Error, Pool, Result};

/// A memory of a given size that only counts allocated bytes. Clones share the count, so that a test can
/// observe the allocations of an engine.
#[derive(Clone, Debug)]
pub struct CountedMemory {
    size: usize,
    taken: Arc<AtomicUsize>,
}

/// A block of [`CountedMemory`], which is freed on drop.
#[derive(Debug)]
pub struct CountedBlock {
    bytes: usize,
    taken: Arc<AtomicUsize>,
}

impl CountedMemory {
    /// Memory of `size` bytes.
    pub fn new(size: usize) -> Self {
        Self { size, taken: Arc::default() }
    }

    /// Bytes that are free.
    pub fn free(&self) -> usize {
        self.size.saturating_sub(self.taken.load(Ordering::Relaxed))
    }

    /// Allocates a block.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if not enough is free.
    pub fn take(&self, pool: Pool, bytes: usize) -> Result<CountedBlock> {
        let available = self.free();
        if bytes > available {
            return Err(Error::OutOfMemory { pool, requested: bytes, available: Some(available) });
        }
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        Ok(CountedBlock { bytes, taken: self.taken.clone() })
    }
}

impl Drop for CountedBlock {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_gone_until_it_is_given_back() {
        let memory = CountedMemory::new(10);
        let block = memory.take(Pool::Kv, 7).unwrap();
        let refused = memory.take(Pool::Adapters, 4).unwrap_err();
        assert_eq!(refused.to_string(), "Adapters pool: 4 bytes asked for; 3 are free");
        drop(block);
        assert_eq!(memory.free(), 10);
    }
}
