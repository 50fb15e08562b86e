//! The memory bandwidth that a plain parallel read reaches, the floor of a decode step.

use std::time::Instant;

use rayon::prelude::*;

use crate::median::median;

/// Bytes of the buffer: larger than any cache, small enough for a laptop.
const BYTES: usize = 1 << 30;
const REPEATS: usize = 5;

/// Reads a buffer with all threads of the current pool and returns the median rate in GB/s.
pub fn read_rate() -> f64 {
    let buffer = vec![1u64; BYTES / 8];
    let share = buffer.len().div_ceil(rayon::current_num_threads());
    let rates = (0..REPEATS)
        .map(|_| {
            let start = Instant::now();
            let sum: u64 = buffer.par_chunks(share).map(sum).reduce(|| 0, u64::wrapping_add);
            assert_eq!(std::hint::black_box(sum), buffer.len() as u64);
            BYTES as f64 / start.elapsed().as_secs_f64() / 1e9
        })
        .collect();
    median(rates)
}

/// Adds up `values` in eight independent sums, so that reads and not the latency of additions bound it.
fn sum(values: &[u64]) -> u64 {
    let (chunks, rest) = values.as_chunks::<8>();
    let mut sums = [0u64; 8];
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*value);
        }
    }
    sums.iter().chain(rest).fold(0, |a, b| a.wrapping_add(*b))
}
