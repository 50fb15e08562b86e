//! Adapters by name and id: loaded and checked once, the same for every request.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use lora_core::formats::{self, AdapterError, ReadOptions};
use lora_core::{Adapter, CkptSource, LoraConfig, LoraRequest, ModelGeometry, Rejections};
use thiserror::Error;

/// Why a `lora_request` cannot be served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The engine was built without LoRA.
    #[error(
        "lora_request {name:?}: this engine was built without lora_config and would answer as \
         the base model; build it with lora_config"
    )]
    NotConfigured {
        /// Name asked for.
        name: String,
    },
    /// A known id or name came with another path.
    #[error(
        "{what} is already used for {known}; it cannot also name {asked}: use another one for \
         another adapter"
    )]
    Conflict {
        /// `lora_int_id 0` or `lora_name "x"`.
        what: String,
        /// The adapter it names.
        known: PathBuf,
        /// The adapter asked for.
        asked: PathBuf,
    },
    /// One adapter is asked for under a known name with another id, or the other way round.
    #[error("{} is known as {known}; it cannot also be asked for as {asked}", path.display())]
    OtherNames {
        /// The adapter.
        path: PathBuf,
        /// Its name and id.
        known: String,
        /// Name and id asked for.
        asked: String,
    },
    /// The adapter cannot be read.
    #[error("adapter {name:?}: {cause}")]
    Load {
        /// Its name.
        name: String,
        /// Why.
        cause: AdapterError,
    },
    /// The request or the adapter breaks rules.
    #[error("adapter {name:?}: {cause}")]
    Rejected {
        /// Its name.
        name: String,
        /// All of them.
        cause: Rejections,
    },
}

/// The adapters that requests have named so far.
pub struct AdapterRegistry {
    config: Option<LoraConfig>,
    geometry: ModelGeometry,
    known: Mutex<HashMap<i64, Known>>,
}

struct Known {
    name: String,
    path: PathBuf,
    source: CkptSource,
    adapter: Arc<Adapter>,
}

impl AdapterRegistry {
    /// An empty registry for a model; without a config it refuses every request.
    pub fn new(config: Option<LoraConfig>, geometry: ModelGeometry) -> Self {
        Self { config, geometry, known: Mutex::default() }
    }

    /// The adapter that a request asks for, loaded and checked at first use.
    ///
    /// # Errors
    /// [`RegistryError`]; the registry is then as before.
    pub fn resolve(&self, request: &LoraRequest) -> Result<Arc<Adapter>, RegistryError> {
        let name = request.lora_name.clone();
        let Some(config) = &self.config else {
            return Err(RegistryError::NotConfigured { name });
        };
        reject(&name, request.validate())?;
        let path =
            std::fs::canonicalize(&request.lora_path).unwrap_or_else(|_| request.lora_path.clone());
        // Loading under the lock keeps two first requests from reading the adapter twice.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(adapter) = find(&known, request, &path)? {
            return Ok(adapter);
        }
        let adapter = Arc::new(self.load(request, &path, config)?);
        known.insert(
            request.lora_int_id,
            Known { name, path, source: request.lora_ckpt_source, adapter: adapter.clone() },
        );
        Ok(adapter)
    }

    fn load(
        &self,
        request: &LoraRequest,
        path: &Path,
        config: &LoraConfig,
    ) -> Result<Adapter, RegistryError> {
        let name = &request.lora_name;
        let options = ReadOptions::from_config(config)
            .map_err(|cause| RegistryError::Rejected { name: name.clone(), cause })?
            .with_source(request.lora_ckpt_source)
            .for_model(self.geometry.clone());
        let adapter = formats::load(path, &options)
            .map_err(|cause| RegistryError::Load { name: name.clone(), cause })?;
        reject(name, adapter.check(&self.geometry, config))?;
        for warning in &adapter.source.warnings {
            tracing::warn!(adapter = %name, "{warning}");
        }
        Ok(adapter)
    }
}

fn reject(name: &str, problems: Vec<lora_core::Rejection>) -> Result<(), RegistryError> {
    match problems.is_empty() {
        true => Ok(()),
        false => {
            Err(RegistryError::Rejected { name: name.to_owned(), cause: Rejections(problems) })
        }
    }
}

/// The adapter known under the request's id and name, if it is the same one.
fn find(
    known: &HashMap<i64, Known>,
    request: &LoraRequest,
    path: &Path,
) -> Result<Option<Arc<Adapter>>, RegistryError> {
    let by_id = known.get_key_value(&request.lora_int_id);
    let by_name = known.iter().find(|(_, entry)| entry.name == request.lora_name);
    let named = [
        (by_id, format!("lora_int_id {}", request.lora_int_id)),
        (by_name, format!("lora_name {:?}", request.lora_name)),
    ];
    for (entry, what) in named {
        let Some((id, entry)) = entry else { continue };
        if entry.path != path || entry.source != request.lora_ckpt_source {
            let (known, asked) = (entry.path.clone(), path.to_owned());
            return Err(RegistryError::Conflict { what, known, asked });
        }
        if (*id, &entry.name) != (request.lora_int_id, &request.lora_name) {
            return Err(RegistryError::OtherNames {
                path: path.to_owned(),
                known: format!("{:?} with lora_int_id {id}", entry.name),
                asked: format!("{:?} with lora_int_id {}", request.lora_name, request.lora_int_id),
            });
        }
    }
    Ok(by_id.map(|(_, entry)| entry.adapter.clone()))
}
