//! Which adapter sits in which slot.

use lora_core::Generation;

/// A slot that was acquired for an adapter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slotted {
    /// Number of the slot.
    pub slot: usize,
    /// Whether the adapter has to be written into it first.
    pub fresh: bool,
}

/// The slots, with the adapters in them. Each running sequence pins the slot of its adapter; an
/// unpinned slot keeps its adapter until another one needs the room, least recently used first.
#[derive(Debug)]
pub struct SlotTable {
    slots: Vec<Slot>,
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    adapter: Option<Generation>,
    pins: usize,
    used: u64,
}

impl SlotTable {
    /// A table of empty slots.
    pub fn new(slots: usize) -> Self {
        Self { slots: vec![Slot::default(); slots], clock: 0 }
    }

    /// Pins the slot of an adapter, evicting another adapter if need be. `None` while all slots
    /// are pinned by others.
    pub fn acquire(&mut self, adapter: Generation) -> Option<Slotted> {
        self.clock += 1;
        let resident = self.slots.iter().position(|s| s.adapter == Some(adapter));
        let slot = resident.or_else(|| {
            let free = self.slots.iter().enumerate().filter(|(_, s)| s.pins == 0);
            free.min_by_key(|(_, s)| s.used).map(|(i, _)| i)
        })?;
        let entry = &mut self.slots[slot];
        *entry = Slot { adapter: Some(adapter), pins: entry.pins + 1, used: self.clock };
        Some(Slotted { slot, fresh: resident.is_none() })
    }

    /// Unpins a slot; its adapter stays.
    pub fn release(&mut self, slot: usize) {
        if let Some(entry) = self.slots.get_mut(slot) {
            debug_assert!(entry.pins > 0, "slot {slot} was released twice");
            entry.pins = entry.pins.saturating_sub(1);
        }
    }

    /// Forgets the adapter of a slot whose contents could not be written.
    pub fn forget(&mut self, slot: usize) {
        if let Some(entry) = self.slots.get_mut(slot) {
            entry.adapter = None;
        }
    }

    /// Number of pins over all slots.
    pub fn pins(&self) -> usize {
        self.slots.iter().map(|s| s.pins).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(n: u8) -> Generation {
        Generation([n; 32])
    }

    #[test]
    fn a_pinned_adapter_is_never_evicted() {
        let mut slots = SlotTable::new(1);
        assert_eq!(slots.acquire(adapter(1)), Some(Slotted { slot: 0, fresh: true }));
        assert_eq!(slots.acquire(adapter(2)), None);
        assert_eq!(slots.acquire(adapter(1)), Some(Slotted { slot: 0, fresh: false }));
        slots.release(0);
        assert_eq!(slots.acquire(adapter(2)), None);
        slots.release(0);
        assert_eq!(slots.acquire(adapter(2)), Some(Slotted { slot: 0, fresh: true }));
        assert_eq!(slots.pins(), 1);
    }

    #[test]
    fn the_least_recently_used_adapter_goes_first() {
        let mut slots = SlotTable::new(2);
        for n in [1, 2, 1] {
            let slot = slots.acquire(adapter(n)).unwrap().slot;
            slots.release(slot);
        }
        assert_eq!(slots.acquire(adapter(3)), Some(Slotted { slot: 1, fresh: true }));
        assert_eq!(slots.acquire(adapter(1)), Some(Slotted { slot: 0, fresh: false }));
    }

    #[test]
    fn a_forgotten_adapter_is_written_again() {
        let mut slots = SlotTable::new(1);
        slots.acquire(adapter(1));
        slots.forget(0);
        slots.release(0);
        assert_eq!(slots.acquire(adapter(1)), Some(Slotted { slot: 0, fresh: true }));
    }
}
