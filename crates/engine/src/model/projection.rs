//! A base projection with its adapter slots.

use lora_core::lora::LoraSite;
use lora_core::{Backend, Comm, Result, Split, TargetModule, View, ViewMut};

use super::pass::Pass;
use super::shard::Part;

/// A base projection, possibly of several stacked modules, with one LoRA site that has a slice per module.
pub struct Projection<B: Backend> {
    /// Base weight and bias, the modules stacked by rows.
    pub weight: B::Linear,
    /// Base bias on the host, for adapters that replace or scale it.
    pub bias: Option<Vec<f32>>,
    /// Modules of the slices, in order.
    pub modules: &'static [TargetModule],
    /// This rank's part of each module.
    pub parts: Vec<Part>,
    /// Whether the modules are column-parallel or row-parallel.
    pub(super) split: Split,
    /// Adapter slots; none if the engine was built without LoRA.
    pub site: LoraSite<B>,
}

impl<B: Backend> Projection<B> {
    /// The base layer plus each row's adapter, all-reduced over the ranks if the modules are row-parallel.
    /// `lora` is `None` if no row has an adapter.
    ///
    /// # Errors
    /// Errors of the backend.
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

    /// As [`Projection::forward`], for a stacked gate and up: writes `silu(gate) * up` to `out`. `gate_up` is
    /// scratch memory.
    ///
    /// # Errors
    /// Errors of the backend.
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
