//! The adapter API of an engine: resolve, load, unload and list adapters, with their tokenizers.

use std::path::PathBuf;
use std::sync::Arc;

use lora_core::{Generation, LoraRequest};
use serde::Serialize;

use super::LlmError;
use super::commands::Commands;
use super::text::{AdapterTexts, TextModel};
use crate::adapters::{AdapterRegistry, Loaded, Registered};
use crate::core::Command;

/// Status of a registered adapter.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct AdapterStatus {
    /// Its name.
    pub name: String,
    /// Its integer id.
    pub int_id: i64,
    /// Its files.
    pub path: PathBuf,
    /// Hash of its content in hexadecimal, once it was read.
    pub generation: Option<String>,
    /// Its bytes, once it was read.
    pub bytes: Option<u64>,
    /// Whether it is in host memory.
    pub on_host: bool,
    /// Whether it is on the device.
    pub on_device: bool,
    /// Whether it is pinned to host memory.
    pub pinned: bool,
    /// Waiting and running sequences that need it.
    pub leases: usize,
}

/// The adapters of an engine.
pub(super) struct Adapters {
    registry: Arc<AdapterRegistry>,
    texts: AdapterTexts,
    commands: Commands,
}

impl Adapters {
    pub fn new(registry: Arc<AdapterRegistry>, texts: AdapterTexts, commands: Commands) -> Self {
        Self { registry, texts, commands }
    }

    /// Tokenizer, chat template and end tokens of the base model.
    pub fn model_text(&self) -> &Arc<TextModel> {
        self.texts.model()
    }

    /// The registration of a request's adapter. A new adapter is registered; its weights are read later.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if the path does not exist, or another adapter has the name or id.
    pub fn resolve(&self, request: &LoraRequest) -> Result<Arc<Registered>, LlmError> {
        Ok(self.registry.resolve(request)?)
    }

    /// Tokenizer, chat template and end tokens for requests with this adapter.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if its files cannot be used.
    pub fn text_of(&self, adapter: Option<&Arc<Registered>>) -> Result<Arc<TextModel>, LlmError> {
        let Some(entry) = adapter else { return Ok(self.model_text().clone()) };
        self.texts.of(entry).map_err(|error| {
            if entry.generation().is_none() {
                // As for weights that cannot be read: the files may be corrected and registered again.
                self.registry.forget(entry);
            }
            error.into()
        })
    }

    /// The request for a loaded or registered adapter, by name.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if no adapter has this name.
    pub fn named(&self, name: &str) -> Result<LoraRequest, LlmError> {
        Ok(self.registry.named(name)?.request.clone())
    }

    /// Reads an adapter and adds it to the engine's host tier.
    ///
    /// # Errors
    /// [`LlmError::Adapter`]; a previous registration of the name then stays.
    pub fn load(&self, request: &LoraRequest, pinned: bool) -> Result<AdapterStatus, LlmError> {
        let text = self.texts.read(request)?;
        let Loaded { entry, adapter, replaced } = self.registry.load(request)?;
        let install = |reply| Command::Install { entry: entry.clone(), adapter, pinned, reply };
        if let Err(error) = self.commands.ask(install)? {
            self.registry.take_back(&entry, replaced);
            return Err(error.into());
        }
        self.texts.replace(&entry, text);
        if let Some(old) = replaced {
            self.commands.send(Command::Retire(old))?;
        }
        let all = self.list()?;
        all.into_iter().find(|status| status.name == entry.name()).ok_or(LlmError::Stopped)
    }

    /// Unregisters an adapter.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if no adapter has this name.
    pub fn unload(&self, name: &str) -> Result<(), LlmError> {
        let entry = self.registry.unload(name)?;
        self.commands.send(Command::Retire(entry))
    }

    /// All registered adapters, sorted by name.
    ///
    /// # Errors
    /// [`LlmError::Stopped`].
    pub fn list(&self) -> Result<Vec<AdapterStatus>, LlmError> {
        let entries = self.registry.list();
        let residences = self.commands.ask(|reply| Command::Residence(entries.clone(), reply))?;
        let status = entries.iter().zip(residences).map(|(entry, residence)| AdapterStatus {
            name: entry.name().to_owned(),
            int_id: entry.request.lora_int_id,
            path: entry.request.lora_path.clone(),
            generation: entry.generation().as_ref().map(Generation::to_string),
            bytes: residence.bytes,
            on_host: residence.host,
            on_device: residence.device,
            pinned: residence.pinned,
            leases: residence.leases,
        });
        Ok(status.collect())
    }
}
