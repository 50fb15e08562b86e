//! Moving adapters on the engine thread: carries out what [`AdapterTiers`](crate::adapters::AdapterTiers)
//! decides. Loader threads read files; slots of the device are written between steps.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;
use lora_core::Adapter;

use super::event::{Event, SequenceError};
use super::{Command, Core};
use crate::adapters::{
    AdapterId, AdapterLoader, AdapterRegistry, CopyQueue, Order, ReadOutcome, Registered,
    RegistryError,
};
use crate::executor::Executor;

/// Bytes of adapters written between two steps while sequences run. This delays a step by a few
/// milliseconds, and an adapter of common size is complete after a few steps.
const MAX_BYTES_BETWEEN_STEPS: usize = 8 << 20;

/// The adapters that sequences use: their registrations, their weights in host memory, and the reads and
/// copies in progress.
#[derive(Default)]
pub struct AdapterStore {
    registered: HashMap<AdapterId, Arc<Registered>>,
    /// Contents of the host tier.
    weights: HashMap<AdapterId, Arc<Adapter>>,
    loader: Option<AdapterLoader>,
    copies: CopyQueue,
    pub(super) read_time: Duration,
    pub(super) longest_read: Duration,
}

impl AdapterStore {
    /// An empty store with `threads` loader threads, which report to the engine's inbox.
    ///
    /// # Errors
    /// The operating system's, if it cannot start a thread.
    pub fn start(
        threads: usize,
        registry: &Arc<AdapterRegistry>,
        inbox: Sender<Command>,
    ) -> std::io::Result<Self> {
        // If the engine has stopped meanwhile, the adapter is not needed any more.
        let report = move |outcome| drop(inbox.send(Command::Read(outcome)));
        let loader = AdapterLoader::start(threads, registry, report)?;
        Ok(Self { loader: Some(loader), ..Self::default() })
    }

    /// Stores a registration by its number.
    pub(super) fn register(&mut self, entry: &Arc<Registered>) -> AdapterId {
        self.registered.entry(entry.id).or_insert_with(|| entry.clone());
        entry.id
    }
}

impl<E: Executor> Core<E> {
    /// Carries out the orders of the tiers and writes slots up to the budget. Returns whether anything was
    /// done.
    pub(super) fn move_adapters(&mut self) -> bool {
        let orders = self.scheduler.tiers.take_orders();
        let store = &mut self.adapters;
        let mut moved = !orders.is_empty() || !store.copies.is_empty();
        for order in orders {
            match order {
                Order::Read(id) => {
                    if let (Some(loader), Some(entry)) = (&store.loader, store.registered.get(&id))
                    {
                        loader.read(entry.clone());
                    }
                }
                Order::Copy(id, slot) => {
                    if let Some(adapter) = store.weights.get(&id) {
                        store.copies.push(slot, id, adapter.clone());
                    }
                }
                Order::Drop(id) => drop(store.weights.remove(&id)),
                Order::Clear(slot) => store.copies.clear(slot),
                Order::Forget(id) => drop(store.registered.remove(&id)),
            }
        }
        let idle = self.scheduler.running().is_empty();
        let budget = if idle { usize::MAX } else { MAX_BYTES_BETWEEN_STEPS };
        let Self { executor, adapters, .. } = self;
        let sites = executor.sites();
        for (id, result) in adapters.copies.advance(sites, budget, |site| executor.write_site(site))
        {
            moved = true;
            match result {
                Ok(()) => self.scheduler.tiers.copied(id),
                Err(cause) => {
                    let name = self.name_of(id);
                    self.fail_adapter(id, RegistryError::not_written(name, cause));
                }
            }
        }
        moved
    }

    /// Whether adapters are to be moved. That happens between steps, so no step is launched ahead of it.
    pub(super) fn has_adapter_work(&self) -> bool {
        self.scheduler.tiers.has_orders() || !self.adapters.copies.is_empty()
    }

    /// Adds an adapter that a loader thread has read to the host tier.
    pub(super) fn take_read(&mut self, outcome: ReadOutcome) {
        let ReadOutcome { entry, result, took } = outcome;
        self.adapters.read_time += took;
        self.adapters.longest_read = self.adapters.longest_read.max(took);
        let taken = result.and_then(|adapter| self.take_weights(&entry, adapter));
        if let Err(error) = taken {
            self.fail_adapter(entry.id, error);
        }
    }

    /// Adds an adapter that the user loaded to the host tier.
    pub(super) fn install(
        &mut self,
        entry: &Arc<Registered>,
        adapter: Arc<Adapter>,
        pinned: bool,
    ) -> Result<(), Arc<RegistryError>> {
        let id = self.adapters.register(entry);
        self.scheduler.tiers.set_pinned(id, pinned);
        self.take_weights(entry, adapter).inspect_err(|_| self.scheduler.tiers.retire(id))
    }

    fn take_weights(
        &mut self,
        entry: &Registered,
        adapter: Arc<Adapter>,
    ) -> Result<(), Arc<RegistryError>> {
        let (generation, bytes) = (adapter.generation, adapter.bytes() as u64);
        self.adapters.weights.insert(entry.id, adapter);
        self.scheduler.tiers.loaded(entry.id, generation, bytes).map_err(|cause| {
            let name = entry.name().to_owned();
            Arc::new(RegistryError::TooLarge { name, cause })
        })
    }

    /// Ends the sequences that wait for an adapter which cannot be used. No running sequence uses it.
    fn fail_adapter(&mut self, id: AdapterId, error: impl Into<Arc<RegistryError>>) {
        let error = SequenceError::Adapter(error.into());
        self.scheduler.tiers.failed(id);
        for mut sequence in self.scheduler.cancel_waiting(|s| s.adapter == Some(id)) {
            sequence.data.finish(&Event::Failed(error.clone()));
        }
    }

    fn name_of(&self, id: AdapterId) -> String {
        self.adapters.registered.get(&id).map_or_else(String::new, |e| e.name().to_owned())
    }
}
