//! `trainable_token_indices` as the configuration writes it.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::formats::read::fields::Fields;

pub(in super::super) const TOKEN_INDICES: &str = "trainable_token_indices";

/// Token ids by module name.
pub(in super::super) type TokenIndices = BTreeMap<String, Vec<u32>>;

/// Reads the field; a plain list is for the embedding.
pub(super) fn read(fields: &mut Fields<'_>) -> TokenIndices {
    let allowed = "token numbers, each once, or an object of such lists by module name";
    let read = |value: &Value| match value.as_object() {
        Some(modules) => {
            modules.iter().map(|(name, ids)| Some((name.clone(), as_ids(ids)?))).collect()
        }
        None => Some(TokenIndices::from([("embed_tokens".to_owned(), as_ids(value)?)])),
    };
    let mut indices = fields.typed(TOKEN_INDICES, allowed, read).unwrap_or_default();
    indices.retain(|_, ids| !ids.is_empty());
    indices
}

fn as_ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids: Vec<u32> = value.as_array()?.iter().map(id).collect::<Option<_>>()?;
    let distinct: BTreeSet<u32> = ids.iter().copied().collect();
    (distinct.len() == ids.len()).then_some(ids)
}
