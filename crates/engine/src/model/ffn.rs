//! The feed-forward network of a decoder layer.

use lora_core::{Backend, Result};

use super::pass::Pass;
use super::projection::Projection;
use super::state::RunState;

/// The feed-forward network after attention.
pub enum Ffn<B: Backend> {
    /// A dense network: the same weights for every row.
    Dense(DenseFfn<B>),
}

/// A gated MLP: `down(silu(gate(x)) * up(x))`.
pub struct DenseFfn<B: Backend> {
    /// gate and up, as one projection.
    pub gate_up: Projection<B>,
    /// The down projection.
    pub down: Projection<B>,
}

impl<B: Backend> Ffn<B> {
    /// Computes `x = ffn(normed)`.
    ///
    /// # Errors
    /// Errors of the backend.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_, B>,
        q: &mut B::Queue,
        state: &mut RunState<B>,
    ) -> Result<()> {
        match self {
            Self::Dense(dense) => dense.forward(pass, q, state),
        }
    }

    /// Its projections, in order of computation.
    pub fn projections_mut(&mut self) -> impl Iterator<Item = &mut Projection<B>> {
        let Self::Dense(DenseFfn { gate_up, down }) = self;
        [gate_up, down].into_iter()
    }
}

impl<B: Backend> DenseFfn<B> {
    fn forward(&self, pass: &Pass<'_, B>, q: &mut B::Queue, state: &mut RunState<B>) -> Result<()> {
        let (n, lora) = (state.inputs.extents.rows, state.inputs.lora());
        let normed = state.normed.first_rows(n);
        let (gate_up, activated) =
            (state.gate_up.first_rows_mut(n), state.activated.first_rows_mut(n));
        self.gate_up.forward_gated(pass, q, normed, lora, gate_up, activated)?;
        let activated = state.activated.first_rows(n);
        self.down.forward(pass, q, activated, lora, state.x.first_rows_mut(n))
    }
}
