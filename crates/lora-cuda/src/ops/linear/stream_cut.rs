//! How `linear_stream.cu` cuts a GEMM, and which weights it takes.

use lora_core::{DType, MatLayout, Result};

use crate::args::DeviceMat;
use crate::library::functions::Kernel;
use crate::tensor_map::{SWIZZLE, TensorMap};

/// Bytes of shared memory of a block. The rest of a multiprocessor's is left to the kernels before the next
/// GEMM, so that they and with them the next GEMM are made ready while this one runs.
pub const SHARED: usize = 200 << 10;

const _: () = assert!(SHARED == Kernel::LinearStream.max_shared());

/// The most rows that the kernel takes.
pub const MAX_ROWS: usize = 64;

/// As in `linear_stream.cu`: outputs of a warpgroup that multiplies, and threads of a warpgroup.
pub const OUTPUTS: usize = 64;
pub const WARPGROUP: usize = 128;

/// As in `linear_stream.cuh`: tiles of weights in shared memory at most, tiles of inputs, and f32s between rows of
/// sums, so that they lie in different banks.
const MAX_STAGES: usize = 24;
const X_STAGES: usize = 8;
const SUMS_PADDING: usize = 4;

/// As in `linear_stream.cuh`: bytes of `SliceFactors`, bytes besides that are kept for a row, and enough for
/// `Barriers` and the alignment of tiles.
const PART_BYTES: usize = 40;
const ROW_BYTES: usize = 28;
const CONTROL_BYTES: usize = 2048;

/// How much busier the device must be with clusters of two, summed over both widths of tiles, to make up for the
/// exchange of sums between their blocks.
const MIN_CLUSTER_GAIN: f64 = 0.1;

/// How a GEMM is cut for the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    /// Rows of a tile of the input.
    pub rows: usize,
    /// Warpgroups that multiply, of [`OUTPUTS`] outputs each.
    pub warpgroups: usize,
    /// Blocks of a cluster, which split K.
    pub cluster: usize,
    /// Clusters.
    pub clusters: usize,
}

impl Cut {
    /// For `rows` rows and `n` outputs, with `steps` steps of K.
    pub fn new(rows: usize, n: usize, steps: usize, multiprocessors: usize) -> Self {
        let rows = rows.next_power_of_two().max(8);
        let warpgroups = if rows > 32 { 2 } else { 1 };
        let cluster = cluster_size(n, steps, multiprocessors);
        let tiles = n.div_ceil(warpgroups * OUTPUTS);
        Self { rows, warpgroups, cluster, clusters: tiles.min(multiprocessors / cluster) }
    }

    /// Tiles of weights that shared memory has room for beside the rest.
    pub fn stages(&self, slices: usize, rows: usize) -> usize {
        let width = self.warpgroups * OUTPUTS;
        let of_row = 2 * SUMS_PADDING + width + width / self.cluster;
        let sums = self.rows * (of_row * size_of::<f32>() + ROW_BYTES);
        let inputs = X_STAGES / self.warpgroups * self.rows * SWIZZLE;
        let left = SHARED - sums - inputs - slices * rows * PART_BYTES - CONTROL_BYTES;
        (left / (width * SWIZZLE)).min(MAX_STAGES)
    }
}

/// Blocks that split K. Clusters of four would leave multiprocessors idle, as not all groups of them that share
/// an interconnect have a multiple of four.
///
/// It depends on the weights alone, so that a row is summed in the same order whatever the rows beside it: the
/// wave efficiency is that of both widths of tiles together.
fn cluster_size(n: usize, steps: usize, multiprocessors: usize) -> usize {
    let busy = |cluster: usize| {
        let of_tiles = |tiles: usize| {
            let waves = tiles.div_ceil(multiprocessors / cluster).max(1);
            (tiles * cluster) as f64 / (waves * multiprocessors) as f64
        };
        of_tiles(n.div_ceil(OUTPUTS)) + of_tiles(n.div_ceil(2 * OUTPUTS))
    };
    let splits = steps.min(multiprocessors) >= 2;
    if splits && busy(2) > busy(1) + MIN_CLUSTER_GAIN { 2 } else { 1 }
}

/// Whether the kernel takes these weights: what the TMA can read in tiles.
pub fn takes_weights(w: MatLayout) -> bool {
    let known = matches!(w.dtype, DType::F16 | DType::Bf16 | DType::F8E4m3);
    let even = (w.cols * w.dtype.size()).is_multiple_of(16) && w.rows.is_multiple_of(16);
    known && even && w.rows > 0 && w.cols > 0
}

/// How the TMA reads these weights; `None` if the kernel does not take them.
///
/// # Errors
/// Those of [`TensorMap::of`].
pub fn weight_map(weights: DeviceMat) -> Result<Option<TensorMap>> {
    takes_weights(weights.layout()).then(|| TensorMap::of(weights, OUTPUTS)).transpose()
}

/// Steps of K of a GEMM with these weights.
pub fn steps_of(w: MatLayout) -> usize {
    (w.cols * w.dtype.size()).div_ceil(SWIZZLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(rows: usize, n: usize, k: usize, multiprocessors: usize) -> Cut {
        Cut::new(rows, n, (2 * k).div_ceil(SWIZZLE), multiprocessors)
    }

    #[test]
    fn gemms_are_cut_to_fill_the_device() {
        let of = |rows, warpgroups, cluster, clusters| Cut { rows, warpgroups, cluster, clusters };
        assert_eq!(cut(1, 4096, 14336, 132), of(8, 1, 2, 64));
        assert_eq!(cut(8, 6144, 4096, 132), of(8, 1, 2, 66));
        assert_eq!(cut(17, 28672, 4096, 132), of(32, 1, 2, 66));
        assert_eq!(cut(64, 28672, 4096, 132), of(64, 2, 2, 66));
        assert_eq!(cut(64, 4096, 4096, 132), of(64, 2, 2, 32));
        assert_eq!(cut(1, 128_256, 4096, 132), of(8, 1, 1, 132));
        assert_eq!(cut(33, 128, 64, 132), of(64, 2, 1, 1));
    }

    #[test]
    fn other_devices_get_as_many_blocks_as_they_have_multiprocessors() {
        assert_eq!(cut(1, 128_256, 4096, 114).clusters, 114);
        assert_eq!(cut(8, 6144, 4096, 78).clusters * cut(8, 6144, 4096, 78).cluster, 78);
        assert_eq!(cut(8, 6144, 4096, 1).clusters, 1);
    }

    #[test]
    fn shared_memory_holds_several_tiles_of_weights() {
        for (rows, least) in [(1, 20), (32, 18), (64, 6)] {
            let stages = cut(rows, 4096, 4096, 132).stages(3, rows);
            assert!((least..=MAX_STAGES).contains(&stages), "{rows} rows: {stages}");
        }
    }
}
