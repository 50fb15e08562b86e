//! Which slots are to be written, a few sites of the model at a time.

use std::collections::VecDeque;
use std::sync::Arc;

use lora_core::Adapter;

use super::WriteError;
use super::tiers::AdapterId;

/// One site of the model, in one slot.
#[derive(Clone, Copy, Debug)]
pub struct SiteWrite<'a> {
    /// The slot.
    pub slot: usize,
    /// Number of the site.
    pub site: usize,
    /// What is written; `None`: the slot is cleared.
    pub adapter: Option<&'a Arc<Adapter>>,
}

/// What becomes of a slot.
struct Copy {
    slot: usize,
    /// `None`: the slot is cleared.
    adapter: Option<(AdapterId, Arc<Adapter>)>,
    /// Site to be written next.
    site: usize,
}

/// Slots to be written, in order. They are written between steps, a bounded number of bytes each
/// time, so that running sequences go on.
#[derive(Default)]
pub struct CopyQueue {
    copies: VecDeque<Copy>,
}

impl CopyQueue {
    /// Whether nothing is left to write.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// Writes `adapter` into `slot`, over what is there.
    pub fn push(&mut self, slot: usize, id: AdapterId, adapter: Arc<Adapter>) {
        // Every site is written, so what the slot held need not be cleared first.
        self.copies.retain(|copy| copy.slot != slot || copy.adapter.is_some());
        self.copies.push_back(Copy { slot, adapter: Some((id, adapter)), site: 0 });
    }

    /// Frees what `slot` holds; a write to it that is not complete is given up.
    pub fn clear(&mut self, slot: usize) {
        self.copies.retain(|copy| copy.slot != slot);
        self.copies.push_back(Copy { slot, adapter: None, site: 0 });
    }

    /// Writes at least one of the `sites` sites of a model by `write`, which gives the bytes that it wrote,
    /// and stops after `bytes` bytes. Returns the adapters that are complete, or failed; a slot whose
    /// write failed must be cleared.
    pub fn advance(
        &mut self,
        sites: usize,
        bytes: usize,
        mut write: impl FnMut(SiteWrite<'_>) -> Result<usize, WriteError>,
    ) -> Vec<(AdapterId, Result<(), WriteError>)> {
        let (mut written, mut done) = (0, Vec::new());
        while let Some(copy) = self.copies.front_mut() {
            let adapter = copy.adapter.as_ref().map(|(_, adapter)| adapter);
            let result = write(SiteWrite { slot: copy.slot, site: copy.site, adapter });
            copy.site += 1;
            let complete = match result {
                Ok(bytes) => {
                    written += bytes;
                    (copy.site == sites).then_some(Ok(()))
                }
                Err(error) => Some(Err(error)),
            };
            if let Some(result) = complete {
                let copy = self.copies.pop_front();
                done.extend(copy.and_then(|copy| Some((copy.adapter?.0, result))));
            }
            if written > bytes {
                break;
            }
        }
        done
    }
}
