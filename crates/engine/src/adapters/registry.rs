//! The registry: adapters by name and id, and how their files are read.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use lora_core::formats::{self, BaseWeights, ReadOptions};
use lora_core::{
    Adapter, CkptSource, Generation, LoraConfig, LoraRequest, ModelGeometry, Rejections,
};

use super::error::RegistryError;
use super::tiers::AdapterId;

/// A registered adapter. If its name is given to another adapter later, or a reload finds other contents,
/// that is a new registration with a new id.
#[derive(Debug)]
pub struct Registered {
    /// Unique id of the registration.
    pub id: AdapterId,
    /// The request that registered it, with an absolute path.
    pub request: LoraRequest,
    /// Hash of its content, set when it is read first.
    content: OnceLock<Generation>,
}

impl Registered {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.request.lora_name
    }

    /// Hash of its content, once it was read.
    pub fn generation(&self) -> Option<Generation> {
        self.content.get().copied()
    }

    fn path(&self) -> &Path {
        &self.request.lora_path
    }
}

/// All adapters that requests or loads have named so far.
pub struct AdapterRegistry {
    config: Option<LoraConfig>,
    geometry: ModelGeometry,
    base: BaseWeights,
    names: Mutex<Names>,
}

/// Registrations by id and by name.
#[derive(Default)]
struct Names {
    by_id: HashMap<i64, Arc<Registered>>,
    by_name: HashMap<String, Arc<Registered>>,
    /// Number of registrations so far.
    count: u64,
}

impl Names {
    fn add(&mut self, request: LoraRequest) -> Arc<Registered> {
        self.count += 1;
        let id = AdapterId(self.count);
        let entry = Arc::new(Registered { id, request, content: OnceLock::new() });
        self.insert(entry.clone());
        entry
    }

    fn insert(&mut self, entry: Arc<Registered>) {
        self.by_id.insert(entry.request.lora_int_id, entry.clone());
        self.by_name.insert(entry.name().to_owned(), entry);
    }

    fn named(&self, name: &str) -> Result<Arc<Registered>, RegistryError> {
        let unknown = || RegistryError::Unknown { name: name.to_owned() };
        self.by_name.get(name).cloned().ok_or_else(unknown)
    }

    fn remove(&mut self, entry: &Registered) {
        if self.by_name.get(entry.name()).is_some_and(|known| known.id == entry.id) {
            self.by_name.remove(entry.name());
            self.by_id.remove(&entry.request.lora_int_id);
        }
    }
}

impl AdapterRegistry {
    /// An empty registry for a model. Without a config it refuses every request.
    pub fn new(config: Option<LoraConfig>, geometry: ModelGeometry, base: BaseWeights) -> Self {
        Self { config, geometry, base, names: Mutex::default() }
    }

    /// The registration of the adapter that a request names. A new name is registered without reading its
    /// files.
    ///
    /// # Errors
    /// [`RegistryError`]; the registry is then unchanged.
    pub fn resolve(&self, request: &LoraRequest) -> Result<Arc<Registered>, RegistryError> {
        let request = self.checked(request)?;
        let mut names = self.lock();
        match find(&names, &request)? {
            Some(entry) => Ok(entry),
            None => Ok(names.add(request)),
        }
    }

    /// Reads the files of a registered adapter and checks them against the model.
    ///
    /// # Errors
    /// [`RegistryError`], also if the content has changed since it was read first.
    pub fn read(&self, entry: &Registered) -> Result<Adapter, RegistryError> {
        let adapter = self.read_files(&entry.request)?;
        if *entry.content.get_or_init(|| adapter.generation) != adapter.generation {
            let (name, path) = (entry.name().to_owned(), entry.path().to_owned());
            return Err(RegistryError::Changed { name, path });
        }
        Ok(adapter)
    }

    /// Reads an adapter now. If its name is registered with other content, the new registration replaces
    /// the old one, which is returned with it. With the same content, the registration stays.
    ///
    /// # Errors
    /// [`RegistryError`]; the registry is then unchanged.
    pub fn load(&self, request: &LoraRequest) -> Result<Loaded, RegistryError> {
        let request = self.checked(request)?;
        find(&self.lock(), &request)?;
        let adapter = Arc::new(self.read_files(&request)?);
        let mut names = self.lock();
        // Another thread may have used the name while the files were read.
        let before = find(&names, &request)?;
        let entry = match &before {
            Some(entry)
                if *entry.content.get_or_init(|| adapter.generation) == adapter.generation =>
            {
                return Ok(Loaded { entry: entry.clone(), adapter, replaced: None });
            }
            _ => names.add(request),
        };
        entry.content.get_or_init(|| adapter.generation);
        Ok(Loaded { entry, adapter, replaced: before })
    }

    /// Removes a name.
    ///
    /// # Errors
    /// [`RegistryError::Unknown`].
    pub fn unload(&self, name: &str) -> Result<Arc<Registered>, RegistryError> {
        let mut names = self.lock();
        let entry = names.named(name)?;
        names.remove(&entry);
        Ok(entry)
    }

    /// The adapter registered under a name.
    ///
    /// # Errors
    /// [`RegistryError::Unknown`].
    pub fn named(&self, name: &str) -> Result<Arc<Registered>, RegistryError> {
        self.lock().named(name)
    }

    /// Removes a registration whose files could not be used, so that the name can be registered again.
    pub fn forget(&self, entry: &Registered) {
        self.lock().remove(entry);
    }

    /// Undoes an [`AdapterRegistry::load`] whose adapter did not fit the tiers.
    pub fn take_back(&self, loaded: &Registered, replaced: Option<Arc<Registered>>) {
        let mut names = self.lock();
        names.remove(loaded);
        if let Some(old) = replaced {
            names.insert(old);
        }
    }

    /// All registrations, sorted by name.
    pub fn list(&self) -> Vec<Arc<Registered>> {
        let mut all: Vec<_> = self.lock().by_name.values().cloned().collect();
        all.sort_by(|a, b| a.name().cmp(b.name()));
        all
    }

    fn lock(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Validates a request and makes its path absolute.
    fn checked(&self, request: &LoraRequest) -> Result<LoraRequest, RegistryError> {
        if self.config.is_none() {
            return Err(RegistryError::NotConfigured { name: request.lora_name.clone() });
        }
        reject(&request.lora_name, request.validate())?;
        let path = &request.lora_path;
        let absolute = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        Ok(LoraRequest { lora_path: absolute, ..request.clone() })
    }

    fn read_files(&self, request: &LoraRequest) -> Result<Adapter, RegistryError> {
        let name = &request.lora_name;
        let Some(config) = &self.config else {
            return Err(RegistryError::NotConfigured { name: name.clone() });
        };
        let options = ReadOptions::from_config(config)
            .map_err(|cause| RegistryError::Rejected { name: name.clone(), cause })?
            .with_source(request.lora_ckpt_source)
            .for_model(self.geometry.clone())
            .with_base(self.base.clone());
        let adapter = formats::load(&request.lora_path, &options)
            .map_err(|cause| RegistryError::Load { name: name.clone(), cause })?;
        reject(name, adapter.check(&self.geometry, config))?;
        for warning in adapter.source.warnings.iter().chain(&adapter.warnings(&self.geometry)) {
            tracing::warn!(adapter = %name, "{warning}");
        }
        for note in &adapter.source.notes {
            tracing::info!(adapter = %name, "{note}");
        }
        Ok(adapter)
    }
}

/// The result of [`AdapterRegistry::load`].
#[derive(Debug)]
pub struct Loaded {
    /// Its registration.
    pub entry: Arc<Registered>,
    /// Its weights.
    pub adapter: Arc<Adapter>,
    /// The previous registration of its name, if that had other content.
    pub replaced: Option<Arc<Registered>>,
}

fn reject(name: &str, problems: Vec<lora_core::Rejection>) -> Result<(), RegistryError> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(RegistryError::Rejected { name: name.to_owned(), cause: Rejections(problems) })
}

/// The registration with the request's id and name. Fails if it is of another adapter.
fn find(names: &Names, request: &LoraRequest) -> Result<Option<Arc<Registered>>, RegistryError> {
    let by_id = names.by_id.get(&request.lora_int_id);
    let by_name = names.by_name.get(&request.lora_name);
    let named = [
        (by_id, format!("lora_int_id {}", request.lora_int_id)),
        (by_name, format!("lora_name {:?}", request.lora_name)),
    ];
    let path = &request.lora_path;
    for (entry, what) in named {
        let Some(entry) = entry else { continue };
        let same_source = |source: CkptSource| source == request.lora_ckpt_source;
        if entry.path() != path || !same_source(entry.request.lora_ckpt_source) {
            let (known, asked) = (entry.path().to_owned(), path.clone());
            return Err(RegistryError::Conflict { what, known, asked });
        }
        if *entry.request.lora_name != request.lora_name
            || entry.request.lora_int_id != request.lora_int_id
        {
            let (known, asked) = (label(&entry.request), label(request));
            return Err(RegistryError::OtherNames { path: path.clone(), known, asked });
        }
    }
    Ok(by_id.cloned())
}

fn label(request: &LoraRequest) -> String {
    format!("{:?} with lora_int_id {}", request.lora_name, request.lora_int_id)
}
