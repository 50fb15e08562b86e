//! A tensor together with its content hash.

use crate::adapter::generation::Digest;
use crate::device::HostTensor;

/// A tensor in memory and its hash. An adapter's identity is made of the hashes, which are taken while
/// a tensor that was just read is still in a cache.
#[derive(Clone, Debug)]
pub(crate) struct Hashed {
    pub tensor: HostTensor,
    pub digest: Digest,
}

impl Hashed {
    /// Hashes a tensor.
    pub fn new(tensor: HostTensor) -> Self {
        let digest = Digest::of(&tensor);
        Self { tensor, digest }
    }
}
