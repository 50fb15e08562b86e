//! Ranks as threads of one process.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use lora_core::{Comm, Error, Result, check_extent};

use crate::rows::{read_row, row_mut};
use crate::{CpuRef, ViewMut};

/// One rank of a group of threads.
pub struct ThreadComm {
    rank: usize,
    shared: Arc<Shared>,
}

/// State that the ranks of a group share.
struct Shared {
    world: usize,
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

/// The current operation: all ranks put their parts in, then all take them out.
#[derive(Default)]
struct Meeting {
    parts: Vec<Option<Vec<f32>>>,
    /// Ranks that have not taken the parts of this operation yet.
    to_take: usize,
    /// Whether a rank has aborted.
    aborted: bool,
}

impl ThreadComm {
    /// The members of a group, one for each thread.
    pub fn group(world: usize) -> Vec<Self> {
        let meeting = Meeting { parts: vec![None; world], ..Meeting::default() };
        let shared =
            Arc::new(Shared { world, meeting: Mutex::new(meeting), changed: Condvar::new() });
        (0..world).map(|rank| Self { rank, shared: shared.clone() }).collect()
    }

    /// The parts of all ranks, in their order.
    fn exchange(&self, mine: Vec<f32>) -> Result<Vec<Vec<f32>>> {
        let Shared { world, meeting, changed } = &*self.shared;
        let lock = meeting.lock().unwrap_or_else(PoisonError::into_inner);
        // No part may be put in before all ranks have taken those of the previous operation.
        let between = |meeting: &mut Meeting| meeting.to_take > 0 && !meeting.aborted;
        let mut lock = changed.wait_while(lock, between).unwrap_or_else(PoisonError::into_inner);
        if lock.aborted {
            return Err(Error::Peer);
        }
        lock.parts[self.rank] = Some(mine);
        if lock.parts.iter().all(Option::is_some) {
            lock.to_take = *world;
            changed.notify_all();
        }
        let missing = |meeting: &mut Meeting| meeting.to_take == 0 && !meeting.aborted;
        let mut lock = changed.wait_while(lock, missing).unwrap_or_else(PoisonError::into_inner);
        // Once all parts are in, the operation succeeds even if a rank has aborted since.
        if lock.to_take == 0 {
            return Err(Error::Peer);
        }
        let all = lock.parts.iter().flatten().cloned().collect();
        lock.to_take -= 1;
        if lock.to_take == 0 {
            lock.parts.fill(None);
            changed.notify_all();
        }
        Ok(all)
    }
}

/// The elements of a matrix, row by row.
fn elements(be: &CpuRef, t: &ViewMut<'_>) -> Vec<f32> {
    let (mut all, mut row) = (Vec::new(), Vec::new());
    for r in 0..t.layout.rows {
        read_row(be.isa(), &t.as_view(), r, &mut row);
        all.extend_from_slice(&row);
    }
    all
}

/// Sums in rank order, so that all ranks get the same bits.
fn sum(parts: &[Vec<f32>]) -> Vec<f32> {
    let count = parts.first().map_or(0, Vec::len);
    (0..count).map(|i| parts.iter().map(|part| part[i]).sum()).collect()
}

impl Comm<CpuRef> for ThreadComm {
    type Seat = Self;

    fn seats(world: usize) -> Result<Vec<Self>> {
        Ok(Self::group(world))
    }

    fn join(_: &CpuRef, seat: Self) -> Result<Self> {
        Ok(seat)
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.shared.world
    }

    fn all_reduce_sum(&self, be: &CpuRef, (): &mut (), mut t: ViewMut<'_>) -> Result<()> {
        if self.world() == 1 {
            return Ok(());
        }
        let sum = sum(&self.exchange(elements(be, &t))?);
        for r in 0..t.layout.rows {
            let cols = r * t.layout.cols..(r + 1) * t.layout.cols;
            row_mut(be.isa(), &mut t, r).store(&sum[cols]);
        }
        Ok(())
    }

    fn all_gather_cols(&self, be: &CpuRef, (): &mut (), mut t: ViewMut<'_>) -> Result<()> {
        let world = self.world();
        if world == 1 {
            return Ok(());
        }
        let share = t.layout.cols / world;
        check_extent("all_gather_cols", "columns", t.layout.cols, share * world)?;
        let mut mine = t.reborrow();
        mine.layout = mine.layout.slice_cols(self.rank * share..(self.rank + 1) * share);
        let parts = self.exchange(elements(be, &mine))?;
        for r in 0..t.layout.rows {
            let row = |part: &Vec<f32>| part[r * share..(r + 1) * share].to_vec();
            let whole: Vec<f32> = parts.iter().flat_map(row).collect();
            row_mut(be.isa(), &mut t, r).store(&whole);
        }
        Ok(())
    }

    fn sum_on_host(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        match self.world() {
            1 => Ok(values),
            _ => Ok(sum(&self.exchange(values)?)),
        }
    }

    fn abort(&self) {
        let mut lock = self.shared.meeting.lock().unwrap_or_else(PoisonError::into_inner);
        lock.aborted = true;
        self.shared.changed.notify_all();
    }
}

/// A rank that is dropped aborts the group, so that no peer waits for it.
impl Drop for ThreadComm {
    fn drop(&mut self) {
        self.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_core::{Backend, DType, Pool, Tensor};

    /// What `run` leaves of two rows of four numbers, on each of `world` ranks.
    fn on_ranks(
        world: usize,
        run: impl Fn(&ThreadComm, &CpuRef, ViewMut<'_>) -> Result<()> + Copy + Send + 'static,
    ) -> Vec<Result<Vec<f32>>> {
        let ranks = ThreadComm::group(world).into_iter().map(|comm| {
            std::thread::spawn(move || {
                let be = CpuRef::new();
                let mut t: Tensor<CpuRef> =
                    Tensor::zeros(&be, Pool::Activations, 2, 4, DType::F32)?;
                let mine = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
                let mine = mine.map(|v| v * (comm.rank() + 1) as f32);
                be.upload(&mut (), bytemuck::bytes_of(&mine), t.view_mut())?;
                run(&comm, &be, t.view_mut())?;
                run(&comm, &be, t.view_mut())?;
                let bytes = be.download(&mut (), t.view())?;
                Ok(bytemuck::pod_collect_to_vec::<u8, f32>(&bytes))
            })
        });
        ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect()
    }

    #[test]
    fn every_rank_gets_the_sum_over_all() {
        for found in on_ranks(3, |comm, be, t| comm.all_reduce_sum(be, &mut (), t)) {
            // Summed twice: three ranks of the sum of 1, 2 and 3 times the numbers.
            assert_eq!(found.unwrap(), [18.0, 36.0, 54.0, 72.0, 90.0, 108.0, 126.0, 144.0]);
        }
        for found in on_ranks(1, |comm, be, t| comm.all_reduce_sum(be, &mut (), t)) {
            assert_eq!(found.unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        }
    }

    #[test]
    fn every_rank_gets_the_columns_of_all() {
        for found in on_ranks(2, |comm, be, t| comm.all_gather_cols(be, &mut (), t)) {
            assert_eq!(found.unwrap(), [1.0, 2.0, 6.0, 8.0, 5.0, 6.0, 14.0, 16.0]);
        }
        let uneven = on_ranks(3, |comm, be, t| comm.all_gather_cols(be, &mut (), t));
        assert!(uneven.iter().all(|found| matches!(found, Err(Error::Shape { .. }))));
    }

    #[test]
    fn nobody_waits_for_a_rank_that_gave_up() {
        let found = on_ranks(3, |comm, be, t| match comm.rank() {
            1 => {
                comm.abort();
                Err(Error::Device("told to".to_owned()))
            }
            _ => comm.all_reduce_sum(be, &mut (), t),
        });
        assert!(matches!(found[..], [Err(Error::Peer), Err(Error::Device(_)), Err(Error::Peer)]));
    }
}
