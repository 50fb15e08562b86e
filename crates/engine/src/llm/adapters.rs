//! Adapters by request of the user: loading ahead, unloading, and what there is.

use std::path::PathBuf;

use lora_core::{Generation, LoraRequest};
use serde::Serialize;

use super::{Llm, LlmError};
use crate::adapters::Loaded;
use crate::core::Command;

/// An adapter that the engine knows.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct AdapterStatus {
    /// Its name.
    pub name: String,
    /// Its number.
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
    /// Whether it stays in host memory whether it is used or not.
    pub pinned: bool,
    /// Sequences that wait for it or run with it.
    pub leases: usize,
}

impl Llm {
    /// Reads an adapter now, so that its first request does not wait for it. Under a known name the
    /// files are read again: requests from here on get the new contents, those in flight end with
    /// the old ones. So is what the folder has of tokenizer, chat template and end tokens. `pinned` keeps it in host memory whether it is used or not.
    ///
    /// # Errors
    /// [`LlmError::Adapter`]; the engine then knows what it knew before.
    pub fn load_adapter(
        &self,
        request: &LoraRequest,
        pinned: bool,
    ) -> Result<AdapterStatus, LlmError> {
        let text = self.texts.read(request)?;
        let Loaded { entry, adapter, replaced } = self.registry.load(request)?;
        let install =
            |reply| Command::Install { entry: entry.clone(), adapter, keep: pinned, reply };
        if let Err(error) = self.ask(install)? {
            self.registry.take_back(&entry, replaced);
            return Err(error.into());
        }
        self.texts.replace(&entry, text);
        if let Some(old) = replaced {
            self.send(Command::Retire(old))?;
        }
        let all = self.list_adapters()?;
        all.into_iter().find(|status| status.name == entry.name()).ok_or(LlmError::Stopped)
    }

    /// Makes an adapter known under its name and number, whose files are read when a request asks for
    /// it: from here on [`Llm::adapter`] gives it by name, and no other adapter can take either.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if the path does not exist, or another adapter has the name or number.
    pub fn register_adapter(&self, request: &LoraRequest) -> Result<(), LlmError> {
        self.registry.resolve(request)?;
        Ok(())
    }

    /// The request for an adapter that was loaded or registered, by its name alone.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if no adapter has this name.
    pub fn adapter(&self, name: &str) -> Result<LoraRequest, LlmError> {
        Ok(self.registry.named(name)?.request.clone())
    }

    /// Forgets an adapter. Requests in flight end with it; its memory is then free.
    ///
    /// # Errors
    /// [`LlmError::Adapter`] if no adapter has this name.
    pub fn unload_adapter(&self, name: &str) -> Result<(), LlmError> {
        let entry = self.registry.unload(name)?;
        self.send(Command::Retire(entry))
    }

    /// All adapters that requests or loads have named, by name.
    ///
    /// # Errors
    /// [`LlmError::Stopped`].
    pub fn list_adapters(&self) -> Result<Vec<AdapterStatus>, LlmError> {
        let entries = self.registry.list();
        let residences = self.ask(|reply| Command::Residence(entries.clone(), reply))?;
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
