//! GEMMs of few rows, whose time goes into reading weights, with what adapters add.
#![allow(unsafe_code)]

use lora_core::{DType, Error, MatLayout, Result};

use super::quantise::Input;
use super::weights::CudaLinear;
use crate::args::{Address, DeviceMat, KernelArgs, MatArg, assert_layout, dtype_number};
use crate::device::Cuda;
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;
use crate::ops::common::WARP;
use crate::ops::lora::args::FewRows;
use crate::tensor_map::{SWIZZLE, TensorMap};

/// Bytes of shared memory of a block. The rest of a multiprocessor's is left to the kernels before the next
/// GEMM, so that they and with them the next GEMM are made ready while this one runs.
const SHARED: usize = 200 << 10;

const _: () = assert!(SHARED == Kernel::LinearStream.max_shared());

/// The most rows that the kernel takes.
pub const MAX_ROWS: usize = 64;

/// As in `linear_stream.cu`: outputs of a warpgroup that multiplies, and threads of a warpgroup.
pub const OUTPUTS: usize = 64;
const WARPGROUP: usize = 128;

/// As in `linear_stream.cu`: tiles of weights in shared memory at most, tiles of inputs, and f32s between rows of
/// sums, so that they lie in different banks.
const MAX_STAGES: usize = 24;
const X_STAGES: usize = 8;
const SUMS_PADDING: usize = 4;

/// As in `linear_stream.cu`: bytes of a `Part`, bytes besides that are kept for a row, and enough for `Control` and
/// the alignment of tiles.
const PART_BYTES: usize = 40;
const ROW_BYTES: usize = 28;
const CONTROL_BYTES: usize = 2048;

/// How much busier the device must be with clusters of two, summed over both widths of tiles, to make up for the
/// exchange of sums between their blocks.
const MIN_CLUSTER_GAIN: f64 = 0.1;

#[repr(C)]
#[derive(Clone, Copy)]
struct StreamArgs {
    w: TensorMap,
    x: TensorMap,
    out: MatArg,
    x_scales: Address,
    w_scales: Address,
    bias: Address,
    lora: FewRows,
    dtype: i32,
    steps: i32,
    stages: i32,
}

assert_layout!(
    StreamArgs is 448 bytes:
    w at 0, x at 128, out at 256, x_scales at 288, bias at 304, lora at 312, dtype at 392,
    stages at 400
);

// SAFETY: laid out as `StreamArgs` of `linear_stream.cu`.
unsafe impl KernelArgs for StreamArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::LinearStream];
}

/// How a GEMM is cut for the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Cut {
    /// Rows of a tile of the input.
    rows: usize,
    /// Warpgroups that multiply, of [`OUTPUTS`] outputs each.
    warpgroups: usize,
    /// Blocks of a cluster, which split K.
    cluster: usize,
    /// Clusters.
    clusters: usize,
}

impl Cut {
    /// For `rows` rows and `n` outputs, with `steps` steps of K.
    fn new(rows: usize, n: usize, steps: usize, multiprocessors: usize) -> Self {
        let rows = rows.next_power_of_two().max(8);
        let warpgroups = if rows > 32 { 2 } else { 1 };
        let cluster = cluster_size(n, steps, multiprocessors);
        let tiles = n.div_ceil(warpgroups * OUTPUTS);
        Self { rows, warpgroups, cluster, clusters: tiles.min(multiprocessors / cluster) }
    }

    /// Tiles of weights that shared memory has room for beside the rest.
    fn stages(&self, slices: usize, rows: usize) -> usize {
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

/// `out = x wᵀ + bias` with what adapters add, for operands that [`GemmShape::suits_stream`] says suit.
///
/// [`GemmShape::suits_stream`]: super::choice::GemmShape::suits_stream
pub fn gemm(
    cuda: &Cuda,
    q: &mut CudaQueue,
    input: &Input,
    w: &CudaLinear,
    lora: Option<FewRows>,
    out: DeviceMat,
) -> Result<()> {
    let absent = || Error::Device("weights that the TMA cannot read".to_owned());
    let map = w.stream_map().ok_or_else(absent)?;
    let (layout, rows) = (w.layout(), input.x.layout().rows);
    let steps = (layout.cols * layout.dtype.size()).div_ceil(SWIZZLE);
    let cut = Cut::new(rows, layout.rows, steps, cuda.multiprocessors);
    let lora = lora.unwrap_or(FewRows::NONE);
    let args = StreamArgs {
        w: *map,
        x: TensorMap::of(input.x, cut.rows)?,
        out: out.into(),
        x_scales: input.row_scales_or_null(),
        w_scales: w.w_scales(),
        bias: w.bias(),
        lora,
        dtype: dtype_number(layout.dtype),
        steps: steps as i32,
        stages: cut.stages(lora.slices(), rows) as i32,
    };
    let launch = Launch {
        grid: [cut.clusters, 1, cut.cluster],
        // The warpgroups that multiply, the epilogue's, and two warps that load weights and inputs.
        threads: (cut.warpgroups + 1) * WARPGROUP + 2 * WARP,
        shared: SHARED,
        cluster: cut.cluster,
    };
    cuda.launch(q, Kernel::LinearStream, launch, args)
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
