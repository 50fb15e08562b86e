//! Cache of the tokenizers, chat templates and end tokens of registered adapters.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use lora_core::{AdapterTokenizer, CkptSource, LoraConfig, LoraRequest};

use super::adapter::{AdapterText, AdapterTextError};
use super::model::TextModel;
use super::token_pool::TokenPool;
use crate::adapters::{AdapterId, Registered, RegistryError};

/// The result of reading an adapter's text, shared by its requests.
type SharedText = Result<Arc<TextModel>, Arc<RegistryError>>;

/// The texts of the model and of its adapters. Each is read once per registration: later changes of its files
/// have no effect until the adapter is loaded again.
pub(in crate::llm) struct AdapterTexts {
    model: Arc<TextModel>,
    whose: AdapterTokenizer,
    pool: TokenPool,
    entries: Mutex<HashMap<AdapterId, TextEntry>>,
}

/// The text of a registration, kept for as long as the registration exists.
struct TextEntry {
    owner: Weak<Registered>,
    text: Arc<OnceLock<SharedText>>,
}

impl AdapterTexts {
    /// A cache with the model's text only.
    pub fn new(model: TextModel, lora: Option<&LoraConfig>) -> Self {
        Self {
            model: Arc::new(model),
            whose: lora.map_or_else(AdapterTokenizer::default, |lora| lora.adapter_tokenizer),
            pool: TokenPool::default(),
            entries: Mutex::default(),
        }
    }

    /// The model's text.
    pub fn model(&self) -> &Arc<TextModel> {
        &self.model
    }

    /// The text of an adapter, read at its first use.
    ///
    /// # Errors
    /// [`RegistryError::Text`] or [`RegistryError::Rejected`].
    pub fn of(&self, entry: &Arc<Registered>) -> SharedText {
        let text = self.cell(entry);
        text.get_or_init(|| self.read(&entry.request).map_err(Arc::new)).clone()
    }

    /// Reads the text of an adapter, whether or not it is cached.
    ///
    /// # Errors
    /// [`RegistryError::Text`] or [`RegistryError::Rejected`].
    pub fn read(&self, request: &LoraRequest) -> Result<Arc<TextModel>, RegistryError> {
        if request.lora_ckpt_source == CkptSource::Nemo {
            return Ok(self.model.clone());
        }
        let (name, path) = (&request.lora_name, &request.lora_path);
        let read = AdapterText::read_sharing(path, &self.model, self.whose, &self.pool);
        let AdapterText { text, changes } = read.map_err(|error| match error {
            AdapterTextError::File(cause) => {
                RegistryError::Text { name: name.clone(), path: path.clone(), cause }
            }
            AdapterTextError::Rejected(cause) => {
                RegistryError::Rejected { name: name.clone(), cause }
            }
        })?;
        for warning in changes.warnings() {
            tracing::warn!(adapter = %name, "{warning}");
        }
        let lines = changes.lines();
        for line in &lines {
            tracing::info!(adapter = %name, "{line}");
        }
        Ok(if lines.is_empty() { self.model.clone() } else { Arc::new(text) })
    }

    /// Replaces the cached text of an adapter.
    pub fn replace(&self, entry: &Arc<Registered>, text: Arc<TextModel>) {
        let text_entry =
            TextEntry { owner: Arc::downgrade(entry), text: Arc::new(Ok(text).into()) };
        self.lock().insert(entry.id, text_entry);
    }

    /// The cell of an adapter's text. It is filled without holding the lock, as reading takes a while.
    fn cell(&self, entry: &Arc<Registered>) -> Arc<OnceLock<SharedText>> {
        let mut entries = self.lock();
        if let Some(known) = entries.get(&entry.id) {
            return known.text.clone();
        }
        entries.retain(|_, text| text.owner.strong_count() > 0);
        let text = Arc::new(OnceLock::new());
        entries.insert(entry.id, TextEntry { owner: Arc::downgrade(entry), text: text.clone() });
        text
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<AdapterId, TextEntry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
