//! Arrays that the host refills for every step, for the sampling ops.

use bytemuck::{Pod, cast_slice};
use lora_core::{Backend, DType, Pool, Result, Tensor, View};

/// A `[1, capacity]` i32 array that is refilled for each step.
pub struct StepArray<B: Backend> {
    tensor: Tensor<B>,
    len: usize,
}

impl<B: Backend> StepArray<B> {
    /// An empty array with room for `capacity` entries.
    ///
    /// # Errors
    /// [`lora_core::Error::OutOfMemory`].
    pub fn new(be: &B, capacity: usize) -> Result<Self> {
        let tensor = Tensor::zeros(be, Pool::StepInputs, 1, capacity, DType::I32)?;
        Ok(Self { tensor, len: 0 })
    }

    /// Replaces the contents. Grows the array if necessary, which moves it, so CUDA graphs must not use
    /// it.
    ///
    /// # Errors
    /// Errors of the backend.
    pub fn fill<T: Pod>(&mut self, be: &B, q: &mut B::Queue, values: &[T]) -> Result<()> {
        let words: &[i32] = cast_slice(values);
        if words.len() > self.tensor.layout().cols {
            *self = Self::new(be, words.len().next_power_of_two())?;
        }
        self.len = words.len();
        let mut view = self.tensor.view_mut();
        view.layout = view.layout.slice_cols(0..words.len());
        be.upload(q, cast_slice(words), view)
    }

    /// The current entries: `[1, len]`.
    pub fn view(&self) -> View<'_, B> {
        self.tensor.view().slice_cols(0..self.len)
    }

    /// The current entries as rows of `cols`.
    pub fn rows_of(&self, cols: usize) -> View<'_, B> {
        let mut view = self.tensor.view();
        view.layout.rows = self.len / cols.max(1);
        view.layout.cols = cols;
        view.layout.row_stride = cols;
        view
    }
}
