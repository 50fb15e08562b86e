//! The two-tier adapter cache: which adapters are in host memory, which are in slots of the device, and
//! which are loaded next.
//!
//! It only decides and counts. The engine thread carries out its [`Order`]s and reports their results. An
//! adapter moves from its files to the host tier, and from there to a slot of the device tier. Eviction is
//! LRU, except that adapters in use by running sequences stay on the device, and adapters pinned by the
//! user stay in host memory. Of two adapters that waiting sequences need, the one needed earlier in the
//! queue is never evicted for the one needed later, so the first sequence in the queue always makes
//! progress.

use std::collections::{BTreeMap, HashMap};

use lora_core::Generation;
use thiserror::Error;

use super::tier::{Tier, TierSize, TierSizes};

/// Id of a registered adapter. A reload with other contents gets a new one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AdapterId(pub u64);

/// What the engine thread has to do for the tiers, in the order given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Read the adapter's files. Report [`AdapterTiers::loaded`] or [`AdapterTiers::failed`].
    Read(AdapterId),
    /// Write the adapter into the slot. Report [`AdapterTiers::copied`] or [`AdapterTiers::failed`].
    Copy(AdapterId, usize),
    /// Free the adapter's host memory.
    Drop(AdapterId),
    /// Clear the slot.
    Clear(usize),
    /// Drop the registration: no further order refers to it.
    Forget(AdapterId),
}

/// An adapter that a tier can never hold.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error(
    "the adapter takes {bytes} bytes, but the {tier} tier holds {size}{}; raise {knob}",
    pinned_note(*pinned)
)]
pub struct TooLarge {
    /// `host` or `device`.
    pub tier: &'static str,
    /// Bytes of the adapter.
    pub bytes: u64,
    /// Capacity of the tier.
    pub size: TierSize,
    /// Number of other adapters pinned to the tier.
    pub pinned: usize,
    /// The settings to change.
    pub knob: &'static str,
}

fn pinned_note(pinned: usize) -> String {
    match pinned {
        0 => String::new(),
        count => format!(", and {count} adapters are pinned to it"),
    }
}

/// Counts of the cache since the engine's start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TierStats {
    /// Sequences submitted while their adapter was on the device.
    pub device_hits: u64,
    /// Sequences submitted while it was only in host memory.
    pub host_hits: u64,
    /// Sequences submitted while it was in neither.
    pub misses: u64,
    /// Evictions from the device.
    pub device_evictions: u64,
    /// Evictions from host memory.
    pub host_evictions: u64,
    /// Adapters read from files.
    pub reads: u64,
    /// Adapters written into slots.
    pub copies: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum OnHost {
    #[default]
    Absent,
    Reading,
    Present,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum OnDevice {
    #[default]
    Absent,
    Copying(usize),
    Ready(usize),
}

/// State of one adapter in the cache.
#[derive(Debug, Default)]
struct AdapterState {
    /// Its content hash and bytes, known once it was read.
    content: Option<(Generation, u64)>,
    host: OnHost,
    device: OnDevice,
    /// Running sequences that use it.
    in_use: usize,
    /// Waiting and running sequences that need it.
    leases: usize,
    /// Whether the user pinned it to host memory.
    pinned: bool,
    /// Whether it is removed once `leases` is 0.
    retired: bool,
    /// [`AdapterTiers::clock`] of the last use, for LRU order.
    used: u64,
}

impl AdapterState {
    fn bytes(&self) -> u64 {
        self.content.map_or(0, |(_, bytes)| bytes)
    }
}

/// Where an adapter is, for status reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Residence {
    /// In host memory.
    pub host: bool,
    /// In a slot of the device.
    pub device: bool,
    /// Pinned to host memory by the user.
    pub pinned: bool,
    /// Waiting and running sequences that need it.
    pub leases: usize,
    /// Its bytes, once it was read.
    pub bytes: Option<u64>,
}

/// The adapter cache: host tier and device tier.
#[derive(Debug)]
pub struct AdapterTiers {
    entries: BTreeMap<AdapterId, AdapterState>,
    host: Tier,
    device: Tier,
    free_slots: Vec<usize>,
    /// Most concurrent reads.
    readers: usize,
    reading: usize,
    /// Queue position of the first waiting sequence that needs an adapter, by adapter.
    wanted: HashMap<AdapterId, usize>,
    clock: u64,
    stats: TierStats,
    orders: Vec<Order>,
}

impl AdapterTiers {
    /// Empty tiers. The device has as many slots as `device.adapters` says. At most `readers` adapters are
    /// read concurrently.
    pub fn new(sizes: TierSizes, readers: usize) -> Self {
        let TierSizes { host, device } = sizes;
        Self {
            entries: BTreeMap::new(),
            host: Tier::new(host),
            // The number of slots is fixed, even where bytes limit the tier as well.
            free_slots: (0..device.adapters.unwrap_or(0)).rev().collect(),
            device: Tier::new(device),
            readers: readers.max(1),
            reading: 0,
            wanted: HashMap::new(),
            clock: 0,
            stats: TierStats::default(),
            orders: Vec::new(),
        }
    }

    /// Takes the pending orders, to be carried out in this order.
    pub fn take_orders(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.orders)
    }

    /// Whether orders are pending.
    pub fn has_orders(&self) -> bool {
        !self.orders.is_empty()
    }

    /// Counts since the engine's start.
    pub fn stats(&self) -> TierStats {
        self.stats
    }

    /// The host tier and the device tier, with their fill.
    pub fn fill(&self) -> (Tier, Tier) {
        (self.host, self.device)
    }

    /// Where an adapter is.
    pub fn residence(&self, id: AdapterId) -> Residence {
        self.entries.get(&id).map_or_else(Residence::default, |entry| Residence {
            host: entry.host == OnHost::Present,
            device: matches!(entry.device, OnDevice::Ready(_)),
            pinned: entry.pinned,
            leases: entry.leases,
            bytes: entry.content.map(|(_, bytes)| bytes),
        })
    }

    /// Running sequences that use an adapter.
    pub fn in_use(&self) -> usize {
        self.entries.values().map(|entry| entry.in_use).sum()
    }

    /// Registers a submitted sequence that needs the adapter until [`AdapterTiers::unlease`].
    pub fn lease(&mut self, id: AdapterId) {
        let entry = self.entries.entry(id).or_default();
        entry.leases += 1;
        match (entry.device, entry.host) {
            (OnDevice::Ready(_), _) => self.stats.device_hits += 1,
            (_, OnHost::Present) => self.stats.host_hits += 1,
            _ => self.stats.misses += 1,
        }
    }

    /// Ends a lease: the sequence has ended.
    pub fn unlease(&mut self, id: AdapterId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        debug_assert!(entry.leases > 0, "{id:?} was given back twice");
        entry.leases = entry.leases.saturating_sub(1);
        self.remove_if_retired(id);
    }

    /// The content hash of an adapter that is on the device and can be used; `None` if it is not.
    pub fn ready(&self, id: AdapterId) -> Option<Generation> {
        let entry = self.entries.get(&id)?;
        matches!(entry.device, OnDevice::Ready(_)).then_some(entry.content?.0)
    }

    /// Marks an adapter as in use by a running sequence, so that it is not evicted, and returns its slot.
    /// `None` if it is not on the device.
    pub fn acquire(&mut self, id: AdapterId) -> Option<usize> {
        self.clock += 1;
        let entry = self.entries.get_mut(&id)?;
        let OnDevice::Ready(slot) = entry.device else { return None };
        entry.in_use += 1;
        entry.used = self.clock;
        Some(slot)
    }

    /// Ends a use. The adapter stays on the device until it is evicted.
    pub fn release(&mut self, id: AdapterId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        debug_assert!(entry.in_use > 0, "{id:?} was released twice");
        entry.in_use = entry.in_use.saturating_sub(1);
    }

    /// Orders reads and copies for the adapters of waiting sequences, as far as room can be made. `wanted`:
    /// these adapters in queue order, each once.
    pub fn fetch(&mut self, wanted: &[AdapterId]) {
        self.wanted = wanted.iter().copied().zip(0..).collect();
        for id in wanted {
            let Some(entry) = self.entries.get(id) else { continue };
            match (entry.device, entry.host) {
                (OnDevice::Absent, OnHost::Present) => self.start_copy(*id),
                (OnDevice::Absent, OnHost::Absent) => self.start_read(*id),
                _ => (),
            }
        }
    }

    /// Reports that an adapter was read, or that the user loaded it. If the host tier has no room for it
    /// now, it is dropped, to be read again later.
    ///
    /// # Errors
    /// [`TooLarge`] if it can never fit. It is then in neither tier.
    pub fn loaded(
        &mut self,
        id: AdapterId,
        generation: Generation,
        bytes: u64,
    ) -> Result<(), TooLarge> {
        self.end_read(id);
        self.stats.reads += 1;
        self.clock += 1;
        let clock = self.clock;
        let entry = self.entries.entry(id).or_default();
        (entry.content, entry.used) = (Some((generation, bytes)), clock);
        if entry.host == OnHost::Present {
            return Ok(());
        }
        self.check_size(id, bytes).inspect_err(|_| self.orders.push(Order::Drop(id)))?;
        if self.make_host_room(id, bytes) {
            self.host.add(bytes);
            self.set_host(id, OnHost::Present);
        } else {
            self.orders.push(Order::Drop(id));
        }
        self.remove_if_retired(id);
        Ok(())
    }

    /// Reports that a copy to the device is complete.
    pub fn copied(&mut self, id: AdapterId) {
        self.stats.copies += 1;
        self.clock += 1;
        let clock = self.clock;
        if let Some(entry) = self.entries.get_mut(&id)
            && let OnDevice::Copying(slot) = entry.device
        {
            (entry.device, entry.used) = (OnDevice::Ready(slot), clock);
        }
        self.remove_if_retired(id);
    }

    /// Reports that a read or a copy failed. It is tried again for later sequences.
    pub fn failed(&mut self, id: AdapterId) {
        self.end_read(id);
        self.leave_device(id);
        self.remove_if_retired(id);
    }

    /// Pins an adapter to host memory, or unpins it.
    pub fn set_pinned(&mut self, id: AdapterId, pinned: bool) {
        self.entries.entry(id).or_default().pinned = pinned;
    }

    /// Removes an adapter once its last sequence has ended.
    pub fn retire(&mut self, id: AdapterId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.retired = true;
            entry.pinned = false;
            self.remove_if_retired(id);
        }
    }

    fn remove_if_retired(&mut self, id: AdapterId) {
        let Some(entry) = self.entries.get(&id) else { return };
        let moving = entry.host == OnHost::Reading || matches!(entry.device, OnDevice::Copying(_));
        if entry.retired && entry.leases == 0 && !moving {
            self.leave_device(id);
            self.leave_host(id);
            self.entries.remove(&id);
            self.orders.push(Order::Forget(id));
        }
    }

    fn start_read(&mut self, id: AdapterId) {
        let bytes = self.entries.get(&id).map_or(0, AdapterState::bytes);
        if self.reading == self.readers {
            return;
        }
        // If pinned adapters leave no room at all, it is read nevertheless: that gives its size, with
        // which `loaded` refuses it.
        if self.make_host_room(id, bytes) || !self.pinned_beside(id).has_room(bytes) {
            self.reading += 1;
            self.set_host(id, OnHost::Reading);
            self.orders.push(Order::Read(id));
        }
    }

    fn end_read(&mut self, id: AdapterId) {
        if self.entries.get(&id).is_some_and(|entry| entry.host == OnHost::Reading) {
            self.reading -= 1;
            self.set_host(id, OnHost::Absent);
        }
    }

    fn start_copy(&mut self, id: AdapterId) {
        let Some(entry) = self.entries.get(&id) else { return };
        let bytes = entry.bytes();
        let rank = self.rank(id);
        while !self.device.has_room(bytes) {
            let evictable = |entry: &AdapterState| {
                entry.in_use == 0 && matches!(entry.device, OnDevice::Ready(_))
            };
            let Some(victim) = self.victim(rank, evictable) else { return };
            self.leave_device(victim);
            self.stats.device_evictions += 1;
        }
        let Some(slot) = self.free_slots.pop() else { return };
        self.device.add(bytes);
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.device = OnDevice::Copying(slot);
        }
        self.orders.push(Order::Copy(id, slot));
    }

    /// Evicts from the host tier until `bytes` more fit, for adapter `id`. Returns whether they fit.
    fn make_host_room(&mut self, id: AdapterId, bytes: u64) -> bool {
        let rank = self.rank(id);
        while !self.host.has_room(bytes) {
            let evictable = |entry: &AdapterState| {
                let needed = entry.pinned || matches!(entry.device, OnDevice::Copying(_));
                entry.host == OnHost::Present && !needed
            };
            let Some(victim) = self.victim(rank, evictable) else { return false };
            self.leave_host(victim);
            self.stats.host_evictions += 1;
        }
        true
    }

    /// The adapter to evict for one at queue position `rank`, of those for which `evictable` is true: the
    /// least recently used one that no waiting sequence needs, else the one needed last in the queue,
    /// provided that it is needed later than `rank`.
    fn victim(&self, rank: usize, evictable: impl Fn(&AdapterState) -> bool) -> Option<AdapterId> {
        let candidates = self.entries.iter().filter(|(_, entry)| evictable(entry));
        candidates
            .map(|(id, entry)| (self.rank(*id), entry.used, *id))
            .filter(|(theirs, ..)| *theirs > rank || *theirs == usize::MAX)
            .min_by_key(|(theirs, used, _)| (std::cmp::Reverse(*theirs), *used))
            .map(|(.., id)| id)
    }

    /// Queue position of the first sequence that needs an adapter; `usize::MAX` if none does.
    fn rank(&self, id: AdapterId) -> usize {
        self.wanted.get(&id).copied().unwrap_or(usize::MAX)
    }

    fn leave_device(&mut self, id: AdapterId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let (OnDevice::Copying(slot) | OnDevice::Ready(slot)) = entry.device else { return };
        debug_assert_eq!(entry.in_use, 0, "{id:?} leaves the device while it is in use");
        entry.device = OnDevice::Absent;
        self.device.remove(entry.bytes());
        self.free_slots.push(slot);
        self.orders.push(Order::Clear(slot));
    }

    fn leave_host(&mut self, id: AdapterId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if entry.host == OnHost::Present {
            entry.host = OnHost::Absent;
            self.host.remove(entry.bytes());
            self.orders.push(Order::Drop(id));
        }
    }

    fn set_host(&mut self, id: AdapterId, state: OnHost) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.host = state;
        }
    }

    /// The host tier as if it held only the pinned adapters other than `id`.
    fn pinned_beside(&self, id: AdapterId) -> Tier {
        let pinned = self.entries.iter().filter(|(other, entry)| entry.pinned && **other != id);
        let mut tier = Tier::new(self.host.size());
        pinned.for_each(|(_, entry)| tier.add(entry.bytes()));
        tier
    }

    /// Fails if an adapter is too large for a tier, even with everything evicted that can be.
    fn check_size(&self, id: AdapterId, bytes: u64) -> Result<(), TooLarge> {
        let pinned = self.pinned_beside(id);
        let too_large =
            |tier, tier_size, pinned, knob| TooLarge { tier, bytes, size: tier_size, pinned, knob };
        if !pinned.has_room(bytes) {
            let knob = "host_cache_size (or num_host_module_layer or max_cpu_loras, if set), or unpin adapters";
            return Err(too_large("host", self.host.size(), pinned.adapters(), knob));
        }
        if !Tier::new(self.device.size()).has_room(bytes) {
            let knob = "device_cache_percent (or num_device_module_layer or max_loras, if set)";
            return Err(too_large("device", self.device.size(), 0, knob));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
