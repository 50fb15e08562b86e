//! Memory for keys and values: which blocks are free.

mod pool;

pub use pool::BlockPool;
