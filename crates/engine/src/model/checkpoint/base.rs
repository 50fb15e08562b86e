//! The base model's weights on demand, for reading adapters.
//!
//! Adapter files may contain whole base weights (`modules_to_save`, tied or saved embeddings). They are
//! compared with the checkpoint, to find out whether the adapter changes them.

use std::fmt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use lora_core::formats::{BaseError, BaseTensors, BaseWeights};
use lora_core::{HostTensor, ModelGeometry, SiteKey};

use crate::model::{DummySource, FolderSource, Gguf, ModelError, WeightSource};

/// Opens a checkpoint.
type Open = Box<dyn Fn() -> Result<Box<dyn WeightSource + Send>, ModelError> + Send + Sync>;

/// A checkpoint that is opened at the first access, as most adapters need none of its weights.
struct Checkpoint {
    geometry: ModelGeometry,
    open: Open,
    source: Mutex<Option<Box<dyn WeightSource + Send>>>,
}

/// The weights of the model at `path`, a folder or a `.gguf` file. Its files are opened at the first access.
pub fn base_weights(path: &Path, geometry: ModelGeometry) -> BaseWeights {
    let path = path.to_owned();
    weights_of(geometry, move || {
        if path.is_dir() {
            Ok(Box::new(FolderSource::open_unmapped(&path)?))
        } else {
            Ok(Box::new(Gguf::open(&path)?))
        }
    })
}

/// As [`base_weights`], for a model with dummy weights.
pub fn dummy_weights(geometry: ModelGeometry) -> BaseWeights {
    weights_of(geometry, || Ok(Box::new(DummySource::default())))
}

fn weights_of(
    geometry: ModelGeometry,
    open: impl Fn() -> Result<Box<dyn WeightSource + Send>, ModelError> + Send + Sync + 'static,
) -> BaseWeights {
    BaseWeights::new(Checkpoint { geometry, open: Box::new(open), source: Mutex::new(None) })
}

impl Checkpoint {
    /// Name and shape of a site's weight in the checkpoint; `None` if the model has no such site.
    fn place(&self, site: SiteKey) -> Option<(String, Vec<usize>)> {
        let model = &self.geometry;
        if let SiteKey::Layer(layer, _) | SiteKey::Norm(layer, _) = site
            && layer.0 as usize >= model.layers
        {
            return None;
        }
        let site =
            if model.tied_embeddings && site == SiteKey::Head { SiteKey::Embed } else { site };
        let shape = match site {
            SiteKey::Embed | SiteKey::Head => vec![model.vocab, model.hidden],
            SiteKey::Layer(_, module) => {
                let (input, output) = model.dims(module)?;
                vec![output, input]
            }
            SiteKey::Norm(..) | SiteKey::FinalNorm => vec![model.norm_width(site)?],
        };
        let path = site.module().and_then(|module| model.hf_path(module));
        Some((format!("{}.weight", site.hf_name("model.", path)?), shape))
    }
}

impl BaseTensors for Checkpoint {
    fn has(&self, site: SiteKey) -> bool {
        self.place(site).is_some()
    }

    fn weight(&self, site: SiteKey) -> Result<HostTensor, BaseError> {
        let (name, shape) = self.place(site).ok_or_else(|| format!("the model has no {site}"))?;
        let mut opened = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        let source = match &mut *opened {
            Some(source) => source,
            none => none.insert((self.open)()?),
        };
        Ok(source.peek(&name, &shape)?)
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the model's checkpoint")
    }
}
