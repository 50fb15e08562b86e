//! The weights of a base model, with which full weights in adapter files are compared.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::hashed::Hashed;
use crate::adapter::generation::Digest;
use crate::device::{DType, HostTensor};
use crate::modules::SiteKey;

/// Why a weight of the base model cannot be read.
pub type BaseError = Box<dyn Error + Send + Sync>;

/// Reads weights of a base model.
pub trait BaseTensors: fmt::Debug + Send + Sync {
    /// Whether the model has a weight for a site.
    fn has(&self, site: SiteKey) -> bool;

    /// The weight of a site as the checkpoint stores it: `[vocab, hidden]`, `[out, in]` or `[width]`. If
    /// embeddings are tied, `lm_head` has the weight of the embedding.
    ///
    /// # Errors
    /// Errors of the checkpoint; a site that the model does not have.
    fn weight(&self, site: SiteKey) -> Result<HostTensor, BaseError>;
}

/// The weights of a base model, compared by hash. Cheap to clone; clones share the hashes.
#[derive(Clone, Debug)]
pub struct BaseWeights(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    tensors: Box<dyn BaseTensors>,
    /// Hashes of weights that were compared, by the dtype that they were rounded to.
    digests: Mutex<HashMap<(SiteKey, DType), Digest>>,
}

impl BaseWeights {
    /// Compares with the weights that `tensors` reads.
    pub fn new(tensors: impl BaseTensors + 'static) -> Self {
        Self(Arc::new(Shared { tensors: Box::new(tensors), digests: Mutex::default() }))
    }

    /// Whether the model has a weight for a site.
    pub fn has(&self, site: SiteKey) -> bool {
        self.0.tensors.has(site)
    }

    /// The weight of a site; see [`BaseTensors::weight`].
    ///
    /// # Errors
    /// As [`BaseTensors::weight`].
    pub fn weight(&self, site: SiteKey) -> Result<HostTensor, BaseError> {
        self.0.tensors.weight(site)
    }

    /// Whether a tensor equals the weight of a site once that is rounded to the tensor's dtype, so that a
    /// copy saved in float16 is still recognised as a copy.
    pub(crate) fn is_weight(&self, site: SiteKey, candidate: &Hashed) -> Result<bool, BaseError> {
        let Hashed { tensor, digest } = candidate;
        let key = (site, tensor.dtype());
        let known = || self.0.digests.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = known().get(&key) {
            return Ok(own == digest);
        }
        let weight = self.weight(site)?;
        let own = if weight.dtype() == tensor.dtype() {
            Some(weight)
        } else {
            weight.cast(tensor.dtype())
        };
        let Some(own) = own.as_ref().map(Digest::of) else { return Ok(false) };
        known().insert(key, own);
        Ok(own == *digest)
    }
}
