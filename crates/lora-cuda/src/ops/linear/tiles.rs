//! GEMMs of many rows with LoRA and SwiGLU, in one kernel.
#![allow(unsafe_code)]

use lora_core::{DType, MatLayout, Result};

use super::fused_args::{MAX_SLICES, ManyRows};
use super::weights::CudaLinear;
use crate::args::{Address, DeviceMat, KernelArgs, assert_layout};
use crate::device::Cuda;
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;
use crate::ops::common::is_aligned;
use crate::tensor_map::{SWIZZLE, TensorMap};

/// Rows from which on the kernel is about as fast as cuBLASLt's, which cannot add the LoRA term.
const MIN_ROWS: usize = 1536;

/// Minimum wave efficiency at which the fused SwiGLU GEMM beats cuBLASLt and a `silu_mul` after it.
const MIN_WAVE_EFFICIENCY: f64 = 0.8;

/// As in `linear_tiles.cu`: rows and outputs of a tile, blocks of a cluster, threads, rows of a warpgroup that
/// multiplies, and columns of a TMA box.
const ROWS: usize = 128;
const OUTPUTS: usize = 256;
const CLUSTER: usize = 2;
const THREADS: usize = 384;
const WARPGROUP_ROWS: usize = 64;
const BOX_COLUMNS: usize = 64;

/// Bytes of `Control`: barriers, factors, slots of rows, and counts.
const CONTROL: usize = 4 * 4 * 8 + 32 * 24 + ROWS * 4 + 64 * MAX_SLICES * 2;

/// Bytes of shared memory: stages, boxes of outputs, `Control`, and room to align them.
const SHARED: usize =
    4 * (ROWS + OUTPUTS) * SWIZZLE + 4 * WARPGROUP_ROWS * SWIZZLE + CONTROL + 1024;

const _: () = assert!(SHARED == Kernel::LinearTiles.max_shared());

#[repr(C)]
#[derive(Clone, Copy)]
struct TilesArgs {
    w: TensorMap,
    x: TensorMap,
    out: TensorMap,
    bias: Address,
    lora: ManyRows,
    rows: i32,
    cols: i32,
    /// Outputs of a tile, and columns of the weights from its first half to its second: two 128-column halves,
    /// adjacent columns or matching gate and up columns.
    width: i32,
    second: i32,
    /// Steps of K, and boxes of a base output that is added instead of multiplied.
    steps: i32,
    bases: i32,
}

assert_layout!(
    TilesArgs is 512 bytes:
    w at 0, x at 128, out at 256, bias at 384, lora at 392, rows at 464, steps at 480, bases at 484
);

// SAFETY: laid out as `TilesArgs` of `linear_tiles.cuh`.
unsafe impl KernelArgs for TilesArgs {
    const KERNELS: &'static [Kernel] = &[
        Kernel::LinearTiles,
        Kernel::LinearTilesBegin,
        Kernel::LinearTilesGate,
        Kernel::LinearTilesGateAdded,
    ];
}

/// Whether the kernel takes these operands: bf16, and rows that the TMA can read.
fn takes(x: MatLayout, w: MatLayout, out: MatLayout) -> bool {
    let dtypes = [x.dtype, w.dtype, out.dtype] == [DType::Bf16; 3];
    let even = w.cols.is_multiple_of(8) && w.rows.is_multiple_of(8);
    dtypes && even && is_aligned(x) && is_aligned(w) && is_aligned(out)
}

/// Whether the kernel takes these operands, and is the fastest with adapters.
pub fn suits(x: MatLayout, w: MatLayout, out: MatLayout) -> bool {
    x.rows >= MIN_ROWS && takes(x, w, out)
}

/// Whether the kernel takes these operands, and is the fastest for a gate without adapters. cuBLASLt needs another
/// kernel for the gate, so that fewer rows are enough if they keep the device busy.
pub fn suits_gate(x: MatLayout, w: MatLayout, out: MatLayout, multiprocessors: usize) -> bool {
    takes(x, w, out)
        && (x.rows >= MIN_ROWS || wave_efficiency(out, multiprocessors) >= MIN_WAVE_EFFICIENCY)
}

/// The part of the device's tiles, in all waves together, that the gated output fills.
fn wave_efficiency(out: MatLayout, multiprocessors: usize) -> f64 {
    let tiles = tiles(out, OUTPUTS / 2).next_multiple_of(clusters(multiprocessors)).max(1);
    let filled = (out.rows * out.cols) as f64 / (CLUSTER * ROWS * OUTPUTS / 2) as f64;
    filled / tiles as f64
}

/// Tiles of a cluster, `width` outputs wide, that make up `out`.
fn tiles(out: MatLayout, width: usize) -> usize {
    out.rows.div_ceil(CLUSTER * ROWS) * out.cols.div_ceil(width)
}

/// Clusters that run at once.
fn clusters(multiprocessors: usize) -> usize {
    (multiprocessors / CLUSTER).max(1)
}

/// `out = x wᵀ + bias` with the LoRA term.
pub fn gemm(
    cuda: &Cuda,
    q: &mut CudaQueue,
    x: DeviceMat,
    w: &CudaLinear,
    lora: ManyRows,
    out: DeviceMat,
) -> Result<()> {
    let base = Base::Gemm { x, w: w.mat(), bias: w.bias() };
    launch(cuda, q, Kernel::LinearTiles, base, lora, out)
}

/// `out` = the LoRA term, and 0 in rows without one.
pub fn begin(cuda: &Cuda, q: &mut CudaQueue, lora: ManyRows, out: DeviceMat) -> Result<()> {
    launch(cuda, q, Kernel::LinearTilesBegin, Base::Nothing, lora, out)
}

/// `out = silu(gate) * up` of the two halves of `x wᵀ + bias` with the LoRA term.
pub fn gated_gemm(
    cuda: &Cuda,
    q: &mut CudaQueue,
    x: DeviceMat,
    w: &CudaLinear,
    lora: Option<ManyRows>,
    out: DeviceMat,
) -> Result<()> {
    let base = Base::Gemm { x, w: w.mat(), bias: w.bias() };
    launch(cuda, q, Kernel::LinearTilesGate, base, lora.unwrap_or(ManyRows::NONE), out)
}

/// `out = silu(gate) * up` of the two halves of `gate_up` with the LoRA term.
pub fn gate(
    cuda: &Cuda,
    q: &mut CudaQueue,
    gate_up: DeviceMat,
    lora: ManyRows,
    out: DeviceMat,
) -> Result<()> {
    launch(cuda, q, Kernel::LinearTilesGateAdded, Base::Output(gate_up), lora, out)
}

/// Output that the LoRA term is added to.
#[derive(Clone, Copy)]
enum Base {
    /// The product of these.
    Gemm { x: DeviceMat, w: DeviceMat, bias: Address },
    /// A product that another kernel wrote.
    Output(DeviceMat),
    /// Nothing yet.
    Nothing,
}

fn launch(
    cuda: &Cuda,
    q: &mut CudaQueue,
    kernel: Kernel,
    base: Base,
    lora: ManyRows,
    out: DeviceMat,
) -> Result<()> {
    let gated = matches!(kernel, Kernel::LinearTilesGate | Kernel::LinearTilesGateAdded);
    let cols = out.layout().cols;
    let (width, second) = if gated { (OUTPUTS / 2, cols) } else { (OUTPUTS, OUTPUTS / 2) };
    let (x, w, bias) = match base {
        Base::Gemm { x, w, bias } => (x, w, bias),
        // The TMA wants a descriptor of some matrix even for what a kernel does not read.
        Base::Output(output) => (output, out, 0),
        Base::Nothing => (out, out, 0),
    };
    let (steps, bases) = match base {
        Base::Gemm { x, .. } => (steps_of(x.layout()), 0),
        Base::Output(_) => (0, width / BOX_COLUMNS),
        Base::Nothing => (0, 0),
    };
    let args = TilesArgs {
        w: TensorMap::of(w, OUTPUTS / CLUSTER)?,
        x: TensorMap::of(x, ROWS)?,
        out: TensorMap::of(out, WARPGROUP_ROWS)?,
        bias,
        lora,
        rows: out.layout().rows as i32,
        cols: cols as i32,
        width: width as i32,
        second: second as i32,
        steps: steps as i32,
        bases: bases as i32,
    };
    let clusters = tiles(out.layout(), width).min(clusters(cuda.multiprocessors));
    let grid = [clusters, 1, CLUSTER];
    let launch = Launch { grid, threads: THREADS, shared: SHARED, cluster: CLUSTER };
    cuda.launch(q, kernel, launch, args)
}

/// Steps of K of a GEMM with this input.
fn steps_of(x: MatLayout) -> usize {
    (x.cols * x.dtype.size()).div_ceil(SWIZZLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_of_fewer_rows_must_keep_the_device_busy() {
        let suits = |rows, n, multiprocessors| {
            let mat = |rows, cols| MatLayout::dense(rows, cols, DType::Bf16);
            suits_gate(mat(rows, 4096), mat(2 * n, 4096), mat(rows, n), multiprocessors)
        };
        assert!(suits(256, 14336, 132) && suits(1536, 8, 132) && suits(512, 6912, 132));
        // Half of the tiles' rows, a second wave for few clusters, and few tiles.
        assert!(!suits(128, 14336, 132) && !suits(256, 9216, 132) && !suits(256, 4096, 132));
        // The second wave is full where there are fewer multiprocessors.
        assert!(suits(256, 9216, 72));
    }
}
