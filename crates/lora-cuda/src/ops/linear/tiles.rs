//! Products of many rows with what adapters add, in one kernel.
#![allow(unsafe_code)]

use lora_core::lora::SiteSpec;
use lora_core::{DType, MatLayout, Result};

use super::CudaLinear;
use super::stream::{SWIZZLE, TensorMap};
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::device::is_aligned;
use crate::memory::queue::Launch;
use crate::ops::lora::plan::CudaLoraPlan;
use crate::ops::lora::{LoraArgs, starts_of};
use crate::{Cuda, CudaQueue, View, ViewMut};

/// Rows from which on the kernel is about as fast as cuBLASLt's, which leaves adapters to others.
const MIN_ROWS: usize = 1536;

/// What of the device must be busy, at the pace of the slowest, for the kernel to be faster than cuBLASLt and a gate.
const MIN_BUSY: f64 = 0.8;

/// Rows from which on it is the fastest to begin outputs with what adapters add.
const MIN_ROWS_TO_BEGIN: usize = 512;

/// The most rows that the kernel takes: 64 groups of 256.
const MAX_ROWS: usize = 64 * CudaLoraPlan::GROUP_ROWS;

/// Adapters of a group of rows, on average, up to which their factors are taken into the product: each costs
/// about half a step of K.
const MAX_ADAPTERS: usize = 16;

/// As in `linear_tiles.cu`: rows and outputs of a tile, blocks of a cluster, threads, rows of a group of
/// consumers, columns of a box, and slices.
const ROWS: usize = 128;
const OUTPUTS: usize = 256;
const CLUSTER: usize = 2;
const THREADS: usize = 384;
const GROUP_ROWS: usize = 64;
const COLUMNS: usize = 64;
const MAX_SLICES: usize = 4;

/// Bytes of `Control`: barriers, factors, slots of rows, and counts.
const CONTROL: usize = 4 * 4 * 8 + 32 * 24 + ROWS * 4 + 64 * MAX_SLICES * 2;

/// Bytes of shared memory: stages, boxes of outputs, `Control`, and room to align them.
pub const SHARED: usize =
    4 * (ROWS + OUTPUTS) * SWIZZLE + 4 * GROUP_ROWS * SWIZZLE + CONTROL + 1024;

/// Clusters that an H100 or H200 runs at once.
const CLUSTERS: usize = 66;

#[repr(C)]
#[derive(Clone, Copy)]
struct ManyRows {
    table: Address,
    slot_of_row: Address,
    group_starts: Address,
    group_slots: Address,
    z: Address,
    starts: [i32; MAX_SLICES + 1],
    slices: i32,
    max_rank: i32,
}

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
    width: i32,
    second: i32,
    steps: i32,
    bases: i32,
}

// SAFETY: laid out as `TilesArgs` of `linear_tiles.cu`.
unsafe impl KernelArgs for TilesArgs {
    const KERNELS: &'static [Kernel] = &[
        Kernel::LinearTiles,
        Kernel::LinearTilesBegin,
        Kernel::LinearTilesGate,
        Kernel::LinearTilesGateAdded,
    ];
}

/// Whether the kernel takes the adapters of this batch at this site, if the output is in bf16.
pub fn suits(batch: &CudaLoraPlan, spec: &SiteSpec, rows: usize) -> bool {
    let groups = rows.div_ceil(CudaLoraPlan::GROUP_ROWS);
    let few = batch.group_slot_count() <= MAX_ADAPTERS * groups;
    (MIN_ROWS_TO_BEGIN..=MAX_ROWS).contains(&rows) && few && spec.slices.len() <= MAX_SLICES
}

/// Whether [`Cuda::multiply_tiles`] takes these operands, and is the fastest.
pub fn suits_operands(x: MatLayout, w: MatLayout, out: MatLayout) -> bool {
    x.rows >= MIN_ROWS && takes(x, w, out)
}

/// Whether [`Cuda::gate_by_tiles`] takes these operands, and is the fastest without adapters: cuBLASLt leaves gates to
/// others, too, so that fewer rows are enough if they keep the device busy.
pub fn suits_gate(x: MatLayout, w: MatLayout, out: MatLayout) -> bool {
    let tiles = tiles(out, OUTPUTS / 2);
    let work = (out.rows * out.cols) as f64 / (CLUSTER * ROWS * OUTPUTS / 2) as f64;
    let busy = work / tiles.next_multiple_of(CLUSTERS).max(1) as f64;
    takes(x, w, out) && (x.rows >= MIN_ROWS || busy >= MIN_BUSY)
}

/// Tiles of a cluster, so many outputs wide, that make `out`.
fn tiles(out: MatLayout, width: usize) -> usize {
    out.rows.div_ceil(CLUSTER * ROWS) * out.cols.div_ceil(width)
}

fn takes(x: MatLayout, w: MatLayout, out: MatLayout) -> bool {
    let dtypes = [x.dtype, w.dtype, out.dtype] == [DType::Bf16; 3];
    let even = w.cols.is_multiple_of(8) && w.rows.is_multiple_of(8);
    dtypes && even && is_aligned(x) && is_aligned(w) && is_aligned(out)
}

/// A matrix as the kernel reads it.
#[derive(Clone, Copy)]
struct Operand {
    mat: MatArg,
    layout: MatLayout,
}

/// The adapters of a batch at a site, of which `args` has `z`.
#[derive(Clone, Copy)]
pub struct Adapters<'a> {
    /// Where everything lies.
    pub args: &'a LoraArgs,
    /// The batch.
    pub batch: &'a CudaLoraPlan,
    /// The site.
    pub spec: &'a SiteSpec,
}

impl ManyRows {
    /// No adapters.
    const NONE: Self = Self {
        table: 0,
        slot_of_row: 0,
        group_starts: 0,
        group_slots: 0,
        z: 0,
        starts: [0; MAX_SLICES + 1],
        slices: 0,
        max_rank: 0,
    };
}

/// What a kernel of the family does, with its input, weights and bias.
#[derive(Clone, Copy)]
enum Does {
    /// Multiplies.
    Multiply(Operand, Operand, Address),
    /// Nothing but what adapters add.
    Begin,
    /// As `Multiply`, for outputs `silu(gate) * up`.
    Gate(Operand, Operand, Address),
    /// The same of a product that is there.
    GateAdded(Operand),
}

impl Adapters<'_> {
    fn many_rows(&self) -> ManyRows {
        let Self { args, batch, spec } = self;
        let address = |view| MatArg::from(view).data();
        ManyRows {
            table: args.table,
            slot_of_row: address(batch.slot_of_row()),
            group_starts: address(batch.group_starts()),
            group_slots: address(batch.group_slots()),
            z: args.z,
            starts: starts_of(spec),
            slices: args.slices,
            max_rank: args.max_rank,
        }
    }
}

impl Cuda {
    /// `out = x wᵀ + bias` with what adapters add.
    pub(crate) fn multiply_tiles(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        adapters: Adapters<'_>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let [x, weights] = operands(x, w);
        let does = Does::Multiply(x, weights, w.bias());
        self.launch_tiles(q, does, adapters.many_rows(), out)
    }

    /// `out` = what adapters add, and 0 where there are none.
    pub(crate) fn begin_by_tiles(
        &self,
        q: &mut CudaQueue,
        adapters: Adapters<'_>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        self.launch_tiles(q, Does::Begin, adapters.many_rows(), out)
    }

    /// `out = silu(gate) * up` of the two halves of `x wᵀ + bias` with what adapters add.
    pub(crate) fn gate_by_tiles(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        adapters: Option<Adapters<'_>>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let [x, weights] = operands(x, w);
        let lora = adapters.map_or(ManyRows::NONE, |adapters| adapters.many_rows());
        self.launch_tiles(q, Does::Gate(x, weights, w.bias()), lora, out)
    }

    /// `out = silu(gate) * up` of the two halves of `gate_up` with what adapters add.
    pub(crate) fn gate_added_by_tiles(
        &self,
        q: &mut CudaQueue,
        adapters: Adapters<'_>,
        gate_up: &ViewMut<'_>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let base = Operand { mat: gate_up.into(), layout: gate_up.layout };
        self.launch_tiles(q, Does::GateAdded(base), adapters.many_rows(), out)
    }

    fn launch_tiles(
        &self,
        q: &mut CudaQueue,
        does: Does,
        lora: ManyRows,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let outputs = Operand { mat: out.into(), layout: out.layout };
        let map = |of: Operand, rows| TensorMap::of(of.mat, of.layout, rows);
        let (kernel, [x, w], bias) = match does {
            Does::Multiply(x, w, bias) => (Kernel::LinearTiles, [x, w], bias),
            Does::Gate(x, w, bias) => (Kernel::LinearTilesGate, [x, w], bias),
            // What is not read must be a matrix as well.
            Does::Begin => (Kernel::LinearTilesBegin, [outputs, outputs], 0),
            Does::GateAdded(base) => (Kernel::LinearTilesGateAdded, [base, outputs], 0),
        };
        let (width, second) = match does {
            Does::Multiply(..) | Does::Begin => (OUTPUTS, OUTPUTS / 2),
            Does::Gate(..) | Does::GateAdded(_) => (OUTPUTS / 2, out.layout.cols),
        };
        let (steps, bases) = match does {
            Does::Multiply(..) | Does::Gate(..) => (steps_of(x.layout), 0),
            Does::Begin => (0, 0),
            Does::GateAdded(_) => (0, width / COLUMNS),
        };
        let args = TilesArgs {
            w: map(w, OUTPUTS / CLUSTER)?,
            x: map(x, ROWS)?,
            out: map(outputs, GROUP_ROWS)?,
            bias,
            lora,
            rows: out.layout.rows as i32,
            cols: out.layout.cols as i32,
            width: width as i32,
            second: second as i32,
            steps: steps as i32,
            bases: bases as i32,
        };
        let clusters = tiles(out.layout, width).min(CLUSTERS);
        let launch = Launch {
            grid: [clusters, 1, CLUSTER],
            threads: THREADS,
            shared: SHARED,
            cluster: CLUSTER,
        };
        q.launch(&self.modules, kernel, launch, args)
    }
}

fn operands(x: View<'_>, w: &CudaLinear) -> [Operand; 2] {
    [Operand { mat: x.into(), layout: x.layout }, Operand { mat: w.weights(), layout: w.layout() }]
}

/// Steps of K of a product with this input.
fn steps_of(x: MatLayout) -> usize {
    (x.cols * x.dtype.size()).div_ceil(SWIZZLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_of_fewer_rows_must_keep_the_device_busy() {
        let suits = |rows, n| {
            let mat = |rows, cols| MatLayout::dense(rows, cols, DType::Bf16);
            suits_gate(mat(rows, 4096), mat(2 * n, 4096), mat(rows, n))
        };
        assert!(suits(256, 14336) && suits(1536, 8) && suits(512, 6912));
        // Half of the tiles' rows, a second turn for few clusters, and few tiles.
        assert!(!suits(128, 14336) && !suits(256, 9216) && !suits(256, 4096));
    }
}
