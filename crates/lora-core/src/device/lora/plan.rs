//! What a backend makes of the adapters of a step.

use std::fmt::Debug;
use std::hash::Hash;

/// Which adapter each row of a step has, as a backend wants it: sorted, tiled and uploaded once, and then shared
/// by the ops of all layers. See [`crate::Backend::plan_lora`].
pub trait LoraPlan {
    /// What a recorded step takes for granted of a plan besides its rows. A recording may be replayed with any
    /// plan of the same rows and the same key.
    type Key: Copy + Eq + Hash + Debug;

    /// Rows of the step, those without an adapter included.
    fn rows(&self) -> usize;

    /// Whether any row has an adapter.
    fn has_adapters(&self) -> bool;

    /// See [`LoraPlan::Key`].
    fn key(&self) -> Self::Key;
}
