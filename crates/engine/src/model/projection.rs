//! A base projection with the adapters of its modules.

use lora_core::lora::LoraSite;
use lora_core::{Backend, Comm, Result, Split, TargetModule, View, ViewMut};

use super::pass::Pass;
use super::shard::Part;

/// A base projection and its adapters: one site, a slice per module.
pub struct Projection<B: Backend> {
    /// Base weight, the modules' rows stacked, with its bias.
    pub weight: B::Linear,
    /// Base bias on the host, for adapters that replace or scale it.
    pub bias: Option<Vec<f32>>,
    /// Modules of the slices, in order.
    pub modules: &'static [TargetModule],
    /// What this device holds of each module.
    pub parts: Vec<Part>,
    /// How the modules are divided among the devices of a group.
    pub(super) split: Split,
    /// Adapters; the table has no slots when the engine serves none.
    pub site: LoraSite<B>,
}

impl<B: Backend> Projection<B> {
    /// The base layer plus each row's adapter, summed over the ranks where each has some of the input
    /// features. `lora` is `None` when no row has one.
    ///
    /// # Errors
    /// Those of the backend.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_, B>,
        q: &mut B::Queue,
        x: View<'_, B>,
        lora: Option<&B::LoraPlan>,
        mut out: ViewMut<'_, B>,
    ) -> Result<()> {
        let lora = lora.map(|plan| (&self.site, plan));
        pass.be.linear_lora(q, x, &self.weight, lora, out.reborrow())?;
        match self.split {
            Split::Row => pass.comm.all_reduce_sum(pass.be, q, out),
            Split::Column | Split::None => Ok(()),
        }
    }

    /// As [`Projection::forward`], to `gate_up`, of which `out` gets the gated half.
    ///
    /// # Errors
    /// Those of the backend.
    pub(super) fn forward_gated(
        &self,
        pass: &Pass<'_, B>,
        q: &mut B::Queue,
        x: View<'_, B>,
        lora: Option<&B::LoraPlan>,
        gate_up: ViewMut<'_, B>,
        out: ViewMut<'_, B>,
    ) -> Result<()> {
        let lora = lora.map(|plan| (&self.site, plan));
        pass.be.gated_linear_lora(q, x, &self.weight, lora, gate_up, out)
    }
}
