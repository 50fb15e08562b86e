//! Products of few rows, whose time goes into reading weights, with what adapters add.
#![allow(unsafe_code)]

use std::ffi::c_void;

use cudarc::driver::sys;
use lora_core::{DType, MatLayout, Result};

use super::{CudaLinear, Input};
use crate::args::{Address, Kernel, KernelArgs, MatArg, dtype_number};
use crate::device::is_aligned;
use crate::error::failed;
use crate::memory::queue::Launch;
use crate::ops::WARP;
use crate::ops::lora::FewRows;
use crate::{Cuda, CudaQueue, ViewMut};

/// Bytes of shared memory of a block. The rest of a multiprocessor's is left to the kernels before the next
/// product, so that they and with them the next product are made ready while this one runs.
pub const SHARED: usize = 200 << 10;

/// The most rows that the kernel takes.
pub const MAX_ROWS: usize = 64;

/// As in `linear_stream.cu`: outputs of a group of consumers, threads of the epilogue_warps, tiles of weights and
/// of inputs, and elements that keep rows of sums apart.
const OUTPUTS: usize = 64;
const EPILOGUE_WARPS: usize = 128;
const MAX_STAGES: usize = 24;
const X_STAGES: usize = 8;
const SPREAD: usize = 4;

/// Bytes of a row of a tile.
pub const SWIZZLE: usize = 128;

/// Bytes of a `Part` of `linear_stream.cu`, of what else it knows of a row, and enough for its `Control` and
/// the alignment of tiles.
const PART: usize = 40;
const OF_ROW: usize = 28;
const REST: usize = 2048;

/// Blocks that may share the terms of a sum, and how many such clusters an H100 or H200 runs at once.
/// Clusters of four leave multiprocessors idle, as their groups are not all a multiple of four.
const CLUSTERS: [(usize, usize); 2] = [(1, 132), (2, 66)];

/// How the TMA reads a matrix: a `CUtensorMap`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct TensorMap([u64; 16]);

impl TensorMap {
    /// Tiles of `rows` rows by 128 bytes of a matrix.
    ///
    /// # Errors
    /// [`lora_core::Error::Device`] if the driver refuses.
    pub fn of(mat: MatArg, layout: MatLayout, rows: usize) -> Result<Self> {
        let (dtype, size) = match layout.dtype {
            DType::F16 => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2),
            DType::Bf16 => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2),
            _ => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
        };
        let mut map = Self([0; 16]);
        // SAFETY: the map has the size and alignment of a `CUtensorMap`; the arrays have the lengths of
        // a matrix of two dimensions, of which one stride is not given.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                dtype,
                2,
                mat.data() as *mut c_void,
                [layout.cols as u64, layout.rows as u64].as_ptr(),
                [(layout.row_stride.max(layout.cols) * size) as u64].as_ptr(),
                [(SWIZZLE / size) as u32, rows as u32].as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        encoded.result().map_err(failed("cuTensorMapEncodeTiled"))?;
        Ok(map)
    }
}

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

// SAFETY: laid out as `StreamArgs` of `linear_stream.cu`.
unsafe impl KernelArgs for StreamArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::LinearStream];
}

/// How a product is cut for the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Cut {
    /// Rows of a tile of the input.
    rows: usize,
    /// Groups of consumers, of 64 outputs each.
    groups: usize,
    /// Blocks that share the terms of a sum.
    cluster: usize,
    /// Clusters.
    clusters: usize,
}

impl Cut {
    fn new(rows: usize, n: usize, steps: usize) -> Self {
        let rows = rows.next_power_of_two().max(8);
        let groups = if rows > 32 { 2 } else { 1 };
        // What of the device works when all work at the pace of the slowest. It counts for both sizes of
        // tiles, so that sums are shared alike whatever the rows.
        let busy = |&(cluster, at_once): &(usize, usize)| {
            let of_tiles = |tiles: usize| {
                let turns = tiles.div_ceil(at_once).max(1);
                (tiles * cluster) as f64 / (turns * CLUSTERS[0].1) as f64
            };
            of_tiles(n.div_ceil(OUTPUTS)) + of_tiles(n.div_ceil(2 * OUTPUTS))
        };
        let fits = CLUSTERS.iter().filter(|(cluster, _)| *cluster <= steps.max(1));
        let better = |best, next| if busy(next) > busy(best) + 0.1 { next } else { best };
        let (cluster, at_once) = *fits.fold(&CLUSTERS[0], better);
        let clusters = n.div_ceil(groups * OUTPUTS).min(at_once);
        Self { rows, groups, cluster, clusters }
    }

    /// Tiles of weights that shared memory has room for beside the rest.
    fn stages(&self, slices: usize, rows: usize) -> usize {
        let width = self.groups * OUTPUTS;
        let of_row = 2 * SPREAD + width + width / self.cluster;
        let sums = self.rows * (of_row * size_of::<f32>() + OF_ROW);
        let inputs = X_STAGES / self.groups * self.rows * SWIZZLE;
        let left = SHARED - sums - inputs - slices * rows * PART - REST;
        (left / (width * SWIZZLE)).min(MAX_STAGES)
    }
}

/// How the TMA reads these weights; `None` if the kernel does not take them.
///
/// # Errors
/// Those of [`TensorMap::of`].
pub fn tiles_of(weights: MatArg, layout: MatLayout) -> Result<Option<TensorMap>> {
    let known = matches!(layout.dtype, DType::F16 | DType::Bf16 | DType::F8E4m3);
    let even =
        (layout.cols * layout.dtype.size()).is_multiple_of(16) && layout.rows.is_multiple_of(16);
    let suited = known && even && layout.rows > 0 && layout.cols > 0;
    suited.then(|| TensorMap::of(weights, layout, OUTPUTS)).transpose()
}

impl Cuda {
    /// `out = x wᵀ + bias` with what adapters add; `false` where the kernel does not suit.
    pub(crate) fn multiply_stream(
        &self,
        q: &mut CudaQueue,
        x: &Input,
        w: &CudaLinear,
        lora: Option<FewRows>,
        out: &ViewMut<'_>,
    ) -> Result<bool> {
        let layout = w.layout();
        let aligned = is_aligned(x.layout) && is_aligned(out.layout);
        let suited =
            x.layout.dtype == layout.dtype && x.layout.rows <= MAX_ROWS && aligned && !x.exact;
        let Some(tiles) = w.tiles().filter(|_| suited) else { return Ok(false) };
        let steps = (layout.cols * layout.dtype.size()).div_ceil(SWIZZLE);
        let cut = Cut::new(x.layout.rows, layout.rows, steps);
        let lora = lora.unwrap_or(FewRows::NONE);
        let args = StreamArgs {
            w: *tiles,
            x: TensorMap::of(x.mat, x.layout, cut.rows)?,
            out: out.into(),
            x_scales: x.scales,
            w_scales: w.w_scales(),
            bias: w.bias(),
            lora,
            dtype: dtype_number(layout.dtype),
            steps: steps as i32,
            stages: cut.stages(lora.slices(), x.layout.rows) as i32,
        };
        let launch = Launch {
            grid: [cut.clusters, 1, cut.cluster],
            threads: cut.groups * 128 + EPILOGUE_WARPS + 2 * WARP,
            shared: SHARED,
            cluster: cut.cluster,
        };
        q.launch(&self.modules, Kernel::LinearStream, launch, args)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_cut_to_fill_the_device() {
        let cut = |rows, n, k: usize| Cut::new(rows, n, (2 * k).div_ceil(SWIZZLE));
        let of = |rows, groups, cluster, clusters| Cut { rows, groups, cluster, clusters };
        assert_eq!(cut(1, 4096, 14336), of(8, 1, 2, 64));
        assert_eq!(cut(8, 6144, 4096), of(8, 1, 2, 66));
        assert_eq!(cut(17, 28672, 4096), of(32, 1, 2, 66));
        assert_eq!(cut(64, 28672, 4096), of(64, 2, 2, 66));
        assert_eq!(cut(64, 4096, 4096), of(64, 2, 2, 32));
        assert_eq!(cut(1, 128_256, 4096), of(8, 1, 1, 132));
        assert_eq!(cut(33, 128, 64), of(64, 2, 1, 1));
    }

    #[test]
    fn shared_memory_holds_several_tiles_of_weights() {
        for (rows, least) in [(1, 20), (32, 18), (64, 6)] {
            let cut = Cut::new(rows, 4096, 64);
            let stages = cut.stages(3, rows);
            assert!((least..=MAX_STAGES).contains(&stages), "{rows} rows: {stages}");
        }
    }
}
