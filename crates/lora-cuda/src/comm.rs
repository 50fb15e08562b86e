//! The group of a single device.

use lora_core::{Backend, Comm, Error, Result};

use crate::{Cuda, CudaQueue, ViewMut};

/// The only rank of its group.
#[derive(Clone, Copy, Debug, Default)]
pub struct OneRank;

impl Comm<Cuda> for OneRank {
    type Seat = ();

    fn seats(world: usize) -> Result<Vec<()>> {
        match world {
            1 => Ok(vec![()]),
            _ => Err(Error::Unsupported {
                op: "comm",
                backend: Cuda::NAME,
                what: format!("a group of {world} devices; one device serves the whole model"),
            }),
        }
    }

    fn join(_: &Cuda, (): ()) -> Result<Self> {
        Ok(Self)
    }

    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, _: &Cuda, _: &mut CudaQueue, _: ViewMut<'_>) -> Result<()> {
        Ok(())
    }

    fn all_gather_cols(&self, _: &Cuda, _: &mut CudaQueue, _: ViewMut<'_>) -> Result<()> {
        Ok(())
    }

    fn sum_on_host(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn abort(&self) {}
}
