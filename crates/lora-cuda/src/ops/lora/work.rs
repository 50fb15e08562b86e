//! Properties of the resident adapters of a site that launches depend on.

/// Ranks that have room from the first adapter on: those of a tile of the shrink.
const MIN_RANK: usize = 16;

/// What the kernels must handle for the adapters of a table. Recorded steps take it for granted, so it changes
/// seldom: room for ranks is only ever added.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TableWork {
    /// The table never had an adapter.
    #[default]
    Nothing,
    /// Low-rank updates by tensor cores.
    Mma {
        /// Room for ranks.
        rank: usize,
        /// Whether there are factors of outputs.
        gains: bool,
        /// Whether all adapters consist of two factors with ranks in multiples of eight, and no more, so that GEMMs
        /// of many rows take them in.
        plain: bool,
    },
    /// Something that the tensor cores' kernels do not take.
    General {
        /// Room for ranks.
        rank: usize,
    },
}

/// The same of one adapter at a site.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SlotWork {
    /// The largest rank of its slices.
    pub max_rank: usize,
    /// Whether any slice has an effect.
    pub is_active: bool,
    /// Whether any slice has factors of outputs.
    pub has_gain: bool,
    /// Whether any slice has summands of outputs.
    pub has_shift: bool,
    /// Whether the rank of any slice is no multiple of eight.
    pub has_odd_rank: bool,
    /// Whether a slice has something that the tensor cores' kernels do not take: factors in another
    /// dtype than bf16, or a matrix in the base layer's place.
    pub is_general: bool,
}

impl SlotWork {
    /// Whether it is two factors with ranks in multiples of eight, and no more.
    fn is_plain(&self) -> bool {
        !(self.has_gain || self.has_shift || self.has_odd_rank)
    }
}

impl TableWork {
    /// What these adapters need, which come after others that needed `self`.
    #[must_use]
    pub fn after(self, slots: &[SlotWork]) -> Self {
        let rank = slots.iter().map(|slot| slot.max_rank).max().unwrap_or(0);
        let rank = rank.next_power_of_two().max(MIN_RANK).max(self.max_rank());
        if slots.iter().any(|slot| slot.is_general) {
            return Self::General { rank };
        }
        if self == Self::Nothing && slots.iter().all(|slot| !slot.is_active) {
            return Self::Nothing;
        }
        let gains = slots.iter().any(|slot| slot.has_gain);
        let plain = slots.iter().all(SlotWork::is_plain);
        Self::Mma { rank, gains, plain }
    }

    /// Room for ranks between shrink and expand.
    pub fn max_rank(self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Mma { rank, .. } | Self::General { rank } => rank,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_for_ranks_stays_when_adapters_go() {
        let plain = SlotWork { max_rank: 24, is_active: true, ..SlotWork::default() };
        let after = |work: TableWork, slots: &[SlotWork]| work.after(slots);
        assert_eq!(after(TableWork::Nothing, &[SlotWork::default()]), TableWork::Nothing);
        let first = after(TableWork::Nothing, &[SlotWork::default(), plain]);
        assert_eq!(first, TableWork::Mma { rank: 32, gains: false, plain: true });
        assert_eq!(after(first, &[SlotWork::default()]), first);
        let small = SlotWork { max_rank: 4, has_odd_rank: true, has_gain: true, ..plain };
        let odd = after(first, &[small]);
        assert_eq!(odd, TableWork::Mma { rank: 32, gains: true, plain: false });
        let general = SlotWork { max_rank: 100, is_general: true, ..plain };
        assert_eq!(after(odd, &[general, small]), TableWork::General { rank: 128 });
        assert_eq!(
            after(TableWork::General { rank: 128 }, &[plain]),
            TableWork::Mma { rank: 128, gains: false, plain: true }
        );
    }
}
