//! The textual side of every adapter that requests have named.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use lora_core::{AdapterTokenizer, CkptSource, LoraConfig, LoraRequest};

use super::adapter::{AdapterText, AdapterTextError};
use super::model::TextModel;
use super::token_pool::TokenPool;
use crate::adapters::{AdapterId, Registered, RegistryError};

/// What reading led to.
type Outcome = Result<Arc<TextModel>, Arc<RegistryError>>;

/// The texts of the model and of its adapters, each read once for a registration: files that change
/// later do not matter until the adapter is loaded again.
pub(in crate::llm) struct AdapterTexts {
    model: Arc<TextModel>,
    whose: AdapterTokenizer,
    pool: TokenPool,
    known: Mutex<HashMap<AdapterId, Known>>,
}

/// The text of a registration, for as long as somebody has that.
struct Known {
    owner: Weak<Registered>,
    text: Arc<OnceLock<Outcome>>,
}

impl AdapterTexts {
    /// Those of a model whose adapters are not known yet.
    pub fn new(model: TextModel, lora: Option<&LoraConfig>) -> Self {
        Self {
            model: Arc::new(model),
            whose: lora.map_or_else(AdapterTokenizer::default, |lora| lora.adapter_tokenizer),
            pool: TokenPool::default(),
            known: Mutex::default(),
        }
    }

    /// The model's own.
    pub fn model(&self) -> &Arc<TextModel> {
        &self.model
    }

    /// That of an adapter; read at its first use.
    ///
    /// # Errors
    /// [`RegistryError::Text`] or [`RegistryError::Rejected`].
    pub fn of(&self, entry: &Arc<Registered>) -> Outcome {
        let text = self.cell(entry);
        text.get_or_init(|| self.read(&entry.request).map_err(Arc::new)).clone()
    }

    /// Reads that of an adapter, whatever is known of it.
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

    /// Replaces what is known of an adapter by what was read again.
    pub fn replace(&self, entry: &Arc<Registered>, text: Arc<TextModel>) {
        let known = Known { owner: Arc::downgrade(entry), text: Arc::new(Ok(text).into()) };
        self.lock().insert(entry.id, known);
    }

    /// The place of an adapter's text. It is filled outside of the lock: reading takes a while.
    fn cell(&self, entry: &Arc<Registered>) -> Arc<OnceLock<Outcome>> {
        let mut known = self.lock();
        if let Some(known) = known.get(&entry.id) {
            return known.text.clone();
        }
        known.retain(|_, known| known.owner.strong_count() > 0);
        let text = Arc::new(OnceLock::new());
        known.insert(entry.id, Known { owner: Arc::downgrade(entry), text: text.clone() });
        text
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<AdapterId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
