//! Ranks as threads: collective operations without devices.

use std::sync::{Arc, Barrier, Mutex, PoisonError};

use lora_core::{Comm, Result};

use crate::rows::{read_row, row_mut};
use crate::{CpuRef, ViewMut};

/// One rank of a group of threads.
pub struct ThreadComm {
    rank: usize,
    shared: Arc<Shared>,
}

/// Each rank's contribution, and the point where all of them meet.
struct Shared {
    parts: Mutex<Vec<Vec<f32>>>,
    barrier: Barrier,
}

impl ThreadComm {
    /// The members of a group, one for each thread.
    pub fn group(world: usize) -> Vec<Self> {
        let parts = Mutex::new(vec![Vec::new(); world]);
        let shared = Arc::new(Shared { parts, barrier: Barrier::new(world) });
        (0..world).map(|rank| Self { rank, shared: shared.clone() }).collect()
    }
}

impl Comm<CpuRef> for ThreadComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.shared.parts.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Sums in the order of ranks, so that all of them get the same bits.
    fn all_reduce_sum(&self, be: &CpuRef, _: &mut (), mut t: ViewMut<'_>) -> Result<()> {
        let parts = || self.shared.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut mine, mut row) = (Vec::new(), Vec::new());
        for r in 0..t.geo.rows {
            read_row(be.isa(), &t.as_view(), r, &mut row);
            mine.extend_from_slice(&row);
        }
        parts()[self.rank] = mine;
        self.shared.barrier.wait();
        let all = parts().clone();
        for r in 0..t.geo.rows {
            let cols = r * t.geo.cols..(r + 1) * t.geo.cols;
            let sum: Vec<f32> = cols.map(|i| all.iter().map(|part| part[i]).sum()).collect();
            row_mut(be.isa(), &mut t, r).store(&sum);
        }
        // Nobody may overwrite a contribution that another rank has still to read.
        self.shared.barrier.wait();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_core::{Backend, DType, Pool, Tensor};

    #[test]
    fn every_rank_gets_the_sum_over_all() {
        let ranks = ThreadComm::group(3).into_iter().map(|comm| {
            std::thread::spawn(move || {
                let be = CpuRef::new();
                let mut t: Tensor<CpuRef> =
                    Tensor::zeros(&be, Pool::Activations, 2, 2, DType::F32).unwrap();
                let mine = [1.0f32, 2.0, 3.0, 4.0].map(|v| v * (comm.rank() + 1) as f32);
                be.upload(&mut (), bytemuck::bytes_of(&mine), t.view_mut()).unwrap();
                comm.all_reduce_sum(&be, &mut (), t.view_mut()).unwrap();
                bytemuck::pod_collect_to_vec::<u8, f32>(&be.download(&mut (), t.view()).unwrap())
            })
        });
        for rank in ranks.collect::<Vec<_>>() {
            assert_eq!(rank.join().unwrap(), [6.0, 12.0, 18.0, 24.0]);
        }
    }
}
