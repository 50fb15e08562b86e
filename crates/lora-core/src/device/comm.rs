//! Collective operations among the ranks of a tensor-parallel model.

use super::{Backend, Error, Result, ViewMut};

/// Collective operations of one rank with its peers. All ranks must issue them in the same order. In a
/// group of one rank, they do nothing.
///
/// All ranks get bitwise equal results, so that their computations do not diverge.
pub trait Comm<B: Backend>: Sized {
    /// A handle with which a rank joins its group on its own thread.
    type Seat: Send + 'static;

    /// The handles for a group of `world` ranks, in rank order.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] if the backend has no groups of that size.
    fn seats(world: usize) -> Result<Vec<Self::Seat>>;

    /// Joins the group; may wait until all ranks have joined.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] if a peer failed.
    fn join(be: &B, seat: Self::Seat) -> Result<Self>;

    /// This rank's number, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world(&self) -> usize;

    /// All-reduce: replaces `t` on every rank by the sum over the ranks.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] if a peer failed.
    fn all_reduce_sum(&self, be: &B, q: &mut B::Queue, t: ViewMut<'_, B>) -> Result<()>;

    /// All-gather along columns: completes `t`, of which each rank has computed an equal share of the
    /// columns, in rank order.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] if a peer failed, [`crate::Error::Shape`] if the columns cannot be divided
    /// evenly.
    fn all_gather_cols(&self, be: &B, q: &mut B::Queue, t: ViewMut<'_, B>) -> Result<()>;

    /// All-reduce of numbers in host memory, for use while a model or an adapter is loaded.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] if a peer failed.
    fn sum_on_host(&self, values: Vec<f32>) -> Result<Vec<f32>>;

    /// Aborts the group after a failure of this rank: operations of its peers fail instead of waiting for it.
    fn abort(&self);
}

/// A group of one rank, for any backend.
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
