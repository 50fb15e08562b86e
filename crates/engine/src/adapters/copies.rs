//! Pending writes to adapter slots, carried out a few sites of the model at a time.

use std::collections::VecDeque;
use std::sync::Arc;

use lora_core::Adapter;

use super::WriteError;
use super::tiers::AdapterId;

/// A write to one slot of one site of the model.
#[derive(Clone, Copy, Debug)]
pub struct SiteWrite<'a> {
    /// The slot.
    pub slot: usize,
    /// Index of the site.
    pub site: usize,
    /// The adapter to write; `None`: the slot is cleared.
    pub adapter: Option<&'a Arc<Adapter>>,
}

/// A pending write to a slot of all sites.
struct SlotWrite {
    slot: usize,
    /// The adapter to write; `None`: the slot is cleared.
    adapter: Option<(AdapterId, Arc<Adapter>)>,
    /// Index of the next site to write.
    site: usize,
}

/// Pending writes to slots, in order. Between two steps a bounded number of bytes is written, so that
/// running sequences are not delayed by a whole adapter.
#[derive(Default)]
pub struct CopyQueue {
    writes: VecDeque<SlotWrite>,
}

impl CopyQueue {
    /// Whether no write is pending.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Queues a write of `adapter` into `slot`.
    pub fn push(&mut self, slot: usize, id: AdapterId, adapter: Arc<Adapter>) {
        // The write covers every site, so a pending clear of the slot is not needed.
        self.writes.retain(|write| write.slot != slot || write.adapter.is_some());
        self.writes.push_back(SlotWrite { slot, adapter: Some((id, adapter)), site: 0 });
    }

    /// Queues a clear of `slot`. A pending write to it is cancelled.
    pub fn clear(&mut self, slot: usize) {
        self.writes.retain(|write| write.slot != slot);
        self.writes.push_back(SlotWrite { slot, adapter: None, site: 0 });
    }

    /// Calls `write`, which returns the bytes it wrote, for one site after another until more than `bytes`
    /// bytes are written. `sites` is the model's number of sites. Returns the adapters whose write is
    /// complete or failed; the slot of a failed one must be cleared.
    pub fn advance(
        &mut self,
        sites: usize,
        bytes: usize,
        mut write: impl FnMut(SiteWrite<'_>) -> Result<usize, WriteError>,
    ) -> Vec<(AdapterId, Result<(), WriteError>)> {
        let (mut written, mut done) = (0, Vec::new());
        while let Some(current) = self.writes.front_mut() {
            let adapter = current.adapter.as_ref().map(|(_, adapter)| adapter);
            let result = write(SiteWrite { slot: current.slot, site: current.site, adapter });
            current.site += 1;
            let complete = match result {
                Ok(bytes) => {
                    written += bytes;
                    (current.site == sites).then_some(Ok(()))
                }
                Err(error) => Some(Err(error)),
            };
            if let Some(result) = complete {
                let finished = self.writes.pop_front();
                done.extend(finished.and_then(|slot| Some((slot.adapter?.0, result))));
            }
            if written > bytes {
                break;
            }
        }
        done
    }
}
