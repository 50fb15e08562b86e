//! Buffers of the CPU backend.

use bytemuck::{Pod, Zeroable};

/// The unit of a buffer. Its alignment does not exceed the allocator's, as zeroed memory of a larger
/// alignment would be written immediately. A KV cache sized for the worst case must not occupy pages that
/// no sequence uses.
#[repr(C, align(16))]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Chunk([u8; 16]);

/// A zero-initialised block of host memory, aligned for every element type.
pub struct CpuBuf(Vec<Chunk>);

impl CpuBuf {
    /// A block of at least `bytes` zero bytes; `None` if the allocation fails.
    pub fn zeroed(bytes: usize) -> Option<Self> {
        bytemuck::allocation::try_zeroed_vec(bytes.div_ceil(size_of::<Chunk>())).ok().map(Self)
    }

    /// The block as elements of `T`.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(&self.0)
    }

    /// The block as elements of `T`, to write.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}
