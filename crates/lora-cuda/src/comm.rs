//! The group of a single device.

use lora_core::{Comm, Result};

use crate::{Cuda, CudaQueue, ViewMut};

/// The only rank of its group.
#[derive(Clone, Copy, Debug, Default)]
pub struct OneRank;

impl Comm<Cuda> for OneRank {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, _: &Cuda, _: &mut CudaQueue, _: ViewMut<'_>) -> Result<()> {
        Ok(())
    }
}
