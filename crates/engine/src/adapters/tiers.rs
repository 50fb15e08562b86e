//! Which adapters are in host memory and which on the device, and which come next.
//!
//! Pure: it decides and counts, and gives [`Order`]s to the code that moves bytes. An adapter goes from
//! its files to the host tier, and from there to a slot of the device tier. The least recently used one
//! is evicted, except adapters in use by running sequences (on the device) and adapters pinned by
//! the user (on the host). Among adapters that waiting sequences want, one that is wanted earlier is
//! never evicted for one that is wanted later, so the first in the queue always makes progress.

use std::collections::{BTreeMap, HashMap};

use lora_core::Generation;
use thiserror::Error;

use super::tier::{Tier, TierSize};

/// Number of an adapter as it was registered; a reload with other contents gets another one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AdapterId(pub u64);

/// What has to be done outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Read the adapter's files; answer with [`AdapterTiers::loaded`] or [`AdapterTiers::failed`].
    Read(AdapterId),
    /// Write the adapter into the slot; answer with [`AdapterTiers::copied`] or
    /// [`AdapterTiers::failed`].
    Copy(AdapterId, usize),
    /// Free the adapter's host memory.
    Drop(AdapterId),
    /// Free what the slot holds.
    Clear(usize),
    /// Nothing will be asked of the adapter any more.
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
    /// Demand.
    pub bytes: u64,
    /// Capacity.
    pub size: TierSize,
    /// Adapters that the user pinned there.
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

/// How the tiers are used, since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TierStats {
    /// Sequences that came when their adapter was on the device.
    pub device_hits: u64,
    /// Sequences that came when it was in host memory only.
    pub host_hits: u64,
    /// Sequences that came when it was in neither.
    pub misses: u64,
    /// Adapters that gave way on the device.
    pub device_evictions: u64,
    /// Adapters that gave way in host memory.
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

#[derive(Debug, Default)]
struct Entry {
    /// What was learnt when it was read.
    content: Option<(Generation, u64)>,
    host: OnHost,
    device: OnDevice,
    /// Running sequences.
    in_use: usize,
    /// Sequences that have not ended.
    leases: usize,
    /// Whether the user pinned it to host memory.
    pinned: bool,
    /// Whether it goes as soon as nobody needs it.
    retired: bool,
    used: u64,
}

impl Entry {
    fn bytes(&self) -> u64 {
        self.content.map_or(0, |(_, bytes)| bytes)
    }
}

/// Where an adapter is, for people.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Residence {
    /// In host memory.
    pub host: bool,
    /// In a slot of the device.
    pub device: bool,
    /// Pinned to host memory by the user.
    pub pinned: bool,
    /// Sequences that have not ended.
    pub leases: usize,
    /// Bytes, once known.
    pub bytes: Option<u64>,
}

/// Adapters by where they are.
#[derive(Debug)]
pub struct AdapterTiers {
    entries: BTreeMap<AdapterId, Entry>,
    host: Tier,
    device: Tier,
    free_slots: Vec<usize>,
    /// Reads at a time.
    readers: usize,
    reading: usize,
    /// Place in the queue of the first sequence that wants an adapter.
    wanted: HashMap<AdapterId, usize>,
    clock: u64,
    stats: TierStats,
    orders: Vec<Order>,
}

impl AdapterTiers {
    /// Empty tiers; the device has a slot for each of its adapters. At most `readers` adapters are
    /// read at a time.
    pub fn new(host: TierSize, device: TierSize, readers: usize) -> Self {
        Self {
            entries: BTreeMap::new(),
            host: Tier::new(host),
            // A device has a number of slots, whatever else limits it.
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

    /// The orders given since the last call, to be carried out in this order.
    pub fn take_orders(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.orders)
    }

    /// Whether there are orders to be carried out.
    pub fn has_orders(&self) -> bool {
        !self.orders.is_empty()
    }

    /// Use since the start.
    pub fn stats(&self) -> TierStats {
        self.stats
    }

    /// The host tier and the device tier, as filled as they are.
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

    /// Uses by running sequences, over all adapters.
    pub fn in_use(&self) -> usize {
        self.entries.values().map(|entry| entry.in_use).sum()
    }

    /// Says that a sequence needs an adapter until [`AdapterTiers::unlease`].
    pub fn lease(&mut self, id: AdapterId) {
        let entry = self.entries.entry(id).or_default();
        entry.leases += 1;
        match (entry.device, entry.host) {
            (OnDevice::Ready(_), _) => self.stats.device_hits += 1,
            (_, OnHost::Present) => self.stats.host_hits += 1,
            _ => self.stats.misses += 1,
        }
    }

    /// Says that a sequence has ended.
    pub fn unlease(&mut self, id: AdapterId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        debug_assert!(entry.leases > 0, "{id:?} was given back twice");
        entry.leases = entry.leases.saturating_sub(1);
        self.remove_if_retired(id);
    }

    /// The content of an adapter that is on the device, which a running sequence can use.
    pub fn ready(&self, id: AdapterId) -> Option<Generation> {
        let entry = self.entries.get(&id)?;
        matches!(entry.device, OnDevice::Ready(_)).then_some(entry.content?.0)
    }

    /// Takes an adapter that is on the device into use, and returns its slot.
    pub fn acquire(&mut self, id: AdapterId) -> Option<usize> {
        self.clock += 1;
        let entry = self.entries.get_mut(&id)?;
        let OnDevice::Ready(slot) = entry.device else { return None };
        entry.in_use += 1;
        entry.used = self.clock;
        Some(slot)
    }

    /// Ends a use; the adapter stays until another one needs the room.
    pub fn release(&mut self, id: AdapterId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        debug_assert!(entry.in_use > 0, "{id:?} was released twice");
        entry.in_use = entry.in_use.saturating_sub(1);
    }

    /// Brings the adapters nearer that waiting sequences want, as far as there is room. `wanted`:
    /// the queue's adapters in its order, each once.
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

    /// Takes in an adapter that was read, or that the user hands over. If there is no room for it
    /// now, it is dropped again, to be read later.
    ///
    /// # Errors
    /// [`TooLarge`] if it can never fit; it is then nowhere.
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

    /// Takes in that a copy to the device is complete.
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

    /// Takes in that a read or a copy failed. The adapter may be tried again.
    pub fn failed(&mut self, id: AdapterId) {
        self.end_read(id);
        self.leave_device(id);
        self.remove_if_retired(id);
    }

    /// Pins an adapter to host memory, whether it is used or not, or ends that.
    pub fn set_pinned(&mut self, id: AdapterId, pinned: bool) {
        self.entries.entry(id).or_default().pinned = pinned;
    }

    /// Removes an adapter as soon as its last sequence has ended.
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
        let bytes = self.entries.get(&id).map_or(0, Entry::bytes);
        if self.reading == self.readers {
            return;
        }
        // Where pinned adapters leave no room at all, reading it will tell its size, and so refuse it.
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
            let gives_way =
                |entry: &Entry| entry.in_use == 0 && matches!(entry.device, OnDevice::Ready(_));
            let Some(victim) = self.victim(rank, gives_way) else { return };
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

    /// Evicts from the host tier until `bytes` more fit it, for an adapter of its own.
    fn make_host_room(&mut self, id: AdapterId, bytes: u64) -> bool {
        let rank = self.rank(id);
        while !self.host.has_room(bytes) {
            let gives_way = |entry: &Entry| {
                let needed = entry.pinned || matches!(entry.device, OnDevice::Copying(_));
                entry.host == OnHost::Present && !needed
            };
            let Some(victim) = self.victim(rank, gives_way) else { return false };
            self.leave_host(victim);
            self.stats.host_evictions += 1;
        }
        true
    }

    /// Of the adapters that may give way to one of rank `rank`, the one to go: least recently used
    /// among those nobody wants, else the one wanted last.
    fn victim(&self, rank: usize, gives_way: impl Fn(&Entry) -> bool) -> Option<AdapterId> {
        let candidates = self.entries.iter().filter(|(_, entry)| gives_way(entry));
        candidates
            .map(|(id, entry)| (self.rank(*id), entry.used, *id))
            .filter(|(theirs, ..)| *theirs > rank || *theirs == usize::MAX)
            .min_by_key(|(theirs, used, _)| (std::cmp::Reverse(*theirs), *used))
            .map(|(.., id)| id)
    }

    /// Place in the queue; adapters that nobody waits for come behind all.
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

    /// The host tier with nothing in it but other adapters that the user pinned.
    fn pinned_beside(&self, id: AdapterId) -> Tier {
        let pinned = self.entries.iter().filter(|(other, entry)| entry.pinned && **other != id);
        let mut tier = Tier::new(self.host.size());
        pinned.for_each(|(_, entry)| tier.add(entry.bytes()));
        tier
    }

    /// Fails if an adapter fits neither tier, however empty.
    fn check_size(&self, id: AdapterId, bytes: u64) -> Result<(), TooLarge> {
        let pinned = self.pinned_beside(id);
        let too_large =
            |tier, tier_size, pinned, knob| TooLarge { tier, bytes, size: tier_size, pinned, knob };
        if !pinned.has_room(bytes) {
            let knob = "host_cache_size (or max_cpu_loras), or unpin adapters";
            return Err(too_large("host", self.host.size(), pinned.adapters(), knob));
        }
        if !Tier::new(self.device.size()).has_room(bytes) {
            let knob = "device_cache_percent (or max_loras)";
            return Err(too_large("device", self.device.size(), 0, knob));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
