//! The weights of a base model, against which an adapter's full weights are held.

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

    /// The weight of a site as the checkpoint has it: `[vocab, hidden]`, `[out, in]` or `[width]`. Of a
    /// model with tied embeddings, that of the output projection is the embedding's.
    ///
    /// # Errors
    /// Those of the checkpoint; a site that the model does not have.
    fn weight(&self, site: SiteKey) -> Result<HostTensor, BaseError>;
}

/// The weights of a base model, compared by hash. Cheap to clone; clones share the hashes.
#[derive(Clone, Debug)]
pub struct BaseWeights(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    tensors: Box<dyn BaseTensors>,
    /// Hashes of weights rounded to a type, each computed once.
    digests: Mutex<HashMap<(SiteKey, DType), Digest>>,
}

impl BaseWeights {
    /// The weights that `tensors` reads.
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
    /// Those of [`BaseTensors::weight`].
    pub fn weight(&self, site: SiteKey) -> Result<HostTensor, BaseError> {
        self.0.tensors.weight(site)
    }

    /// Whether a tensor is the weight of a site, to the precision of the tensor's own type: a copy that
    /// was saved in float16 is still a copy.
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
