//! Whole weights of a vocabulary that is not the model's, however the file names and declares them.

use super::collect::Collected;
use super::keys::Kind;
use crate::adapter::check::vocabulary;
use crate::geometry::ModelGeometry;
use crate::modules::SiteKey;
use crate::rules::{Rejection, listed};

/// The rejection of a file with an embedding or output layer of the model's width and another
/// vocabulary. PEFT writes both by itself when it was resized, so nothing else about them matters.
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
