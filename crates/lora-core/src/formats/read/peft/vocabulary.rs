//! Full weights of a vocabulary whose size is not the model's.

use super::collect::Collected;
use super::keys::Kind;
use crate::adapter::check::vocabulary;
use crate::geometry::ModelGeometry;
use crate::modules::SiteKey;
use crate::rules::{Rejection, listed};

/// Rejects a file with an embedding or `lm_head` that has the model's width and another number of rows.
/// PEFT saves both, declared or not, once the vocabulary was resized, so this is checked before anything
/// else about them.
pub(super) fn check(file: &Collected, model: &ModelGeometry) -> Option<Rejection> {
    let mut found = None;
    let mut names = Vec::new();
    for key in [SiteKey::Embed, SiteKey::Head] {
        let Some(parts) = file.sites.get(&key) else { continue };
        let whole = parts.tensors.iter().filter(|(kind, _)| matches!(kind, Kind::Full(_)));
        for (_, tensor) in whole {
            match *tensor.shape() {
                [rows, width] if width == model.hidden && rows != model.vocab => {
                    found = Some(rows);
                    names.push(tensor.name());
                }
                _ => {}
            }
        }
    }
    Some(vocabulary::rejection(found?, model.vocab, &listed(&names)))
}
