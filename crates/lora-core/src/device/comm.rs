//! Collective operations of devices that hold parts of one model.

use super::{Backend, Error, Result, ViewMut};

/// Collective operations of one rank with its peers; every rank must issue them in one order. The only rank of
/// its group has nothing to do in any of them.
///
/// All ranks get the same bits: what follows on each of them must not drift apart.
pub trait Comm<B: Backend>: Sized {
    /// What a rank joins its group with, on its own thread.
    type Seat: Send + 'static;

    /// The seats of a group of `world` ranks, in the order of their numbers.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] if the backend has no groups of that size.
    fn seats(world: usize) -> Result<Vec<Self::Seat>>;

    /// Joins the group. Returns once all ranks have, where the backend needs that.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] if a peer failed.
    fn join(be: &B, seat: Self::Seat) -> Result<Self>;

    /// This rank's number, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world(&self) -> usize;

    /// Replaces `t` on every rank by the sum over the ranks.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] if a peer failed.
    fn all_reduce_sum(&self, be: &B, q: &mut B::Queue, t: ViewMut<'_, B>) -> Result<()>;

    /// Completes `t`, of whose columns each rank has computed its share: as many as any other, in the order of
    /// the ranks.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] if a peer failed, [`crate::Error::Shape`] unless the columns can be shared
    /// evenly.
    fn all_gather_cols(&self, be: &B, q: &mut B::Queue, t: ViewMut<'_, B>) -> Result<()>;

    /// The sum over the ranks of numbers in host memory. For what is done when a model or an adapter is loaded.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] if a peer failed.
    fn sum_on_host(&self, values: Vec<f32>) -> Result<Vec<f32>>;

    /// Says that this rank cannot go on, so that no peer waits for it: their operations fail from then on.
    fn abort(&self);
}

/// The only rank of its group, of any backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct OneRank;

impl<B: Backend> Comm<B> for OneRank {
    type Seat = ();

    fn seats(world: usize) -> Result<Vec<()>> {
        match world {
            1 => Ok(vec![()]),
            _ => Err(Error::Unsupported {
                op: "comm",
                backend: B::NAME,
                what: format!("a group of {world} devices; one device serves the whole model"),
            }),
        }
    }

    fn join(_: &B, (): ()) -> Result<Self> {
        Ok(Self)
    }

    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, _: &B, _: &mut B::Queue, _: ViewMut<'_, B>) -> Result<()> {
        Ok(())
    }

    fn all_gather_cols(&self, _: &B, _: &mut B::Queue, _: ViewMut<'_, B>) -> Result<()> {
        Ok(())
    }

    fn sum_on_host(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn abort(&self) {}
}
