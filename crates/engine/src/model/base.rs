//! The weights of a checkpoint, for adapters whose files repeat some of them.

use std::fmt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use lora_core::formats::{BaseError, BaseTensors, BaseWeights};
use lora_core::{HostTensor, ModelGeometry, SiteKey};

use super::{DummySource, FolderSource, Gguf, ModelError, WeightSource};

/// Opens a checkpoint.
type Open = Box<dyn Fn() -> Result<Box<dyn WeightSource + Send>, ModelError> + Send + Sync>;

/// A checkpoint that is opened when the first weight is asked for, which most adapters never do.
struct Checkpoint {
    geometry: ModelGeometry,
    open: Open,
    source: Mutex<Option<Box<dyn WeightSource + Send>>>,
}

/// The weights of the model at `path`, a folder or a `.gguf` file, of these dimensions. The files are
/// opened when they are needed.
pub fn base_weights(path: &Path, geometry: ModelGeometry) -> BaseWeights {
    let path = path.to_owned();
    weights_of(geometry, move || match path.is_dir() {
        true => Ok(Box::new(FolderSource::open_unmapped(&path)?)),
        false => Ok(Box::new(Gguf::open(&path)?)),
    })
}

/// As [`base_weights`] for random weights.
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
    /// Name and shape of a site's weight.
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
