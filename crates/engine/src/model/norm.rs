//! RMS norms whose weights adapters may replace.

use std::collections::BTreeSet;

use lora_core::lora::{LoraSite, SlotSlice};
use lora_core::ops::NormWeight;
use lora_core::{Backend, DType, HostTensor, Result, Tensor};

/// An RMS norm of the base model, with the replacement weights of resident adapters.
pub struct Norm<B: Backend> {
    weight: Tensor<B>,
    site: LoraSite<B>,
    /// Slots whose adapter replaces the weight. Few adapters do, so while this is empty LoRA is skipped.
    slots: BTreeSet<usize>,
}

impl<B: Backend> Norm<B> {
    /// A norm with the base model's weight, `[1, cols]` f32, and an empty site.
    pub fn new(weight: Tensor<B>, site: LoraSite<B>) -> Self {
        Self { weight, site, slots: BTreeSet::new() }
    }

    /// The weight of each row of a batch; `lora` is `None` if no row has an adapter.
    pub fn weight<'a>(&'a self, lora: Option<&'a B::LoraPlan>) -> NormWeight<'a, B> {
        let lora = lora.filter(|_| !self.slots.is_empty()).map(|plan| (&self.site, plan));
        NormWeight { base: self.weight.view(), lora }
    }

    /// Writes an adapter's weight, `[cols]`, into a slot, or clears the slot.
    ///
    /// # Errors
    /// Those of [`Backend::write_slot`].
    pub fn write(
        &mut self,
        be: &B,
        q: &mut B::Queue,
        slot: usize,
        weight: Option<&HostTensor>,
    ) -> Result<()> {
        if weight.is_none() && !self.slots.contains(&slot) {
            return Ok(());
        }
        let replacement = weight.and_then(|weight| weight.cast(DType::F32));
        let slice =
            replacement.is_some().then(|| SlotSlice { replacement, ..SlotSlice::default() });
        let written = slice.is_some();
        be.write_slot(q, &mut self.site, slot, &[slice])?;
        if written {
            self.slots.insert(slot);
        } else {
            self.slots.remove(&slot);
        }
        Ok(())
    }
}
