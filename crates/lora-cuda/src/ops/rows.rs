//! Gathers of rows, and the SwiGLU gate.
#![allow(unsafe_code)]

use lora_core::{DType, MatLayout, Result, check};

use crate::args::{Address, DeviceMat, KernelArgs, MatArg, address, assert_layout};
use crate::device::{Cuda, View, ViewMut};
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;
use crate::ops::common::{ROW_THREADS, VEC8, is_vec8};
use crate::ops::linear::weights::CudaLinear;

#[repr(C)]
#[derive(Clone, Copy)]
struct GatherArgs {
    table: MatArg,
    out: MatArg,
    ids: Address,
}

assert_layout!(GatherArgs is 72 bytes: table at 0, out at 32, ids at 64);

// SAFETY: laid out as `GatherArgs` of `rows.cu`.
unsafe impl KernelArgs for GatherArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::GatherRows, Kernel::GatherRowsVec8];
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GateArgs {
    gate_up: MatArg,
    out: MatArg,
}

assert_layout!(GateArgs is 64 bytes: gate_up at 0, out at 32);

// SAFETY: laid out as `GateArgs` of `rows.cu`.
unsafe impl KernelArgs for GateArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::SiluMul, Kernel::SiluMulVec8];
}

/// See [`lora_core::Backend::embed`].
pub fn embed(
    cuda: &Cuda,
    q: &mut CudaQueue,
    table: &CudaLinear,
    ids: View<'_>,
    out: &ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "embed";
    let layout = table.layout();
    check::float(OP, "table", layout.dtype)?;
    check::embed(layout.cols, ids.layout, out.layout)?;
    cuda.check_ids(q, [OP, "token id"], ids, layout.rows)?;
    gather(cuda, q, table.mat(), ids, out.into())
}

/// See [`lora_core::Backend::gather_rows`].
pub fn gather_rows(
    cuda: &Cuda,
    q: &mut CudaQueue,
    x: View<'_>,
    rows: View<'_>,
    out: &ViewMut<'_>,
) -> Result<()> {
    check::gather_rows(x.layout, rows.layout, out.layout)?;
    cuda.check_ids(q, ["gather_rows", "row"], rows, x.layout.rows)?;
    gather(cuda, q, as_floats(x.into()), rows, as_floats(out.into()))
}

fn gather(
    cuda: &Cuda,
    q: &mut CudaQueue,
    table: DeviceMat,
    ids: View<'_>,
    out: DeviceMat,
) -> Result<()> {
    let args = GatherArgs { table: table.into(), out: out.into(), ids: address(ids) };
    let (kernel, launch) = choose_gather(table.layout(), out.layout());
    cuda.launch(q, kernel, launch, args)
}

/// See [`lora_core::Backend::silu_mul`].
pub fn silu_mul(
    cuda: &Cuda,
    q: &mut CudaQueue,
    gate_up: View<'_>,
    out: &ViewMut<'_>,
) -> Result<()> {
    check::silu_mul(gate_up.layout, out.layout)?;
    let (kernel, launch) = choose_silu_mul(gate_up.layout, out.layout);
    let args = GateArgs { gate_up: gate_up.into(), out: out.into() };
    cuda.launch(q, kernel, launch, args)
}

/// The same bits for a kernel that only moves elements and knows no integers.
fn as_floats(mat: DeviceMat) -> DeviceMat {
    match mat.layout().dtype {
        DType::I32 => mat.as_dtype(DType::F32),
        _ => mat,
    }
}

/// Whether rows consist of whole vectors of eight.
fn suits_vec8(input: MatLayout, out: MatLayout) -> bool {
    is_vec8(&[input, out]) && out.cols.is_multiple_of(VEC8)
}

/// Blocks for all rows of `out`, with threads that take `columns` columns each.
fn launch(out: MatLayout, columns: usize) -> Launch {
    Launch::new([out.rows, out.cols.div_ceil(columns * ROW_THREADS), 1], ROW_THREADS)
}

fn choose_gather(table: MatLayout, out: MatLayout) -> (Kernel, Launch) {
    if suits_vec8(table, out) {
        (Kernel::GatherRowsVec8, launch(out, VEC8))
    } else {
        (Kernel::GatherRows, Launch::new([out.rows, 1, 1], ROW_THREADS))
    }
}

fn choose_silu_mul(gate_up: MatLayout, out: MatLayout) -> (Kernel, Launch) {
    if suits_vec8(gate_up, out) {
        (Kernel::SiluMulVec8, launch(out, VEC8))
    } else {
        (Kernel::SiluMul, launch(out, 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_one_16_bit_dtype_are_gathered_is_vec8() {
        let table = MatLayout::dense(1000, 4096, DType::Bf16);
        let out = MatLayout::dense(3, 4096, DType::Bf16);
        let (kernel, launch) = choose_gather(table, out);
        assert_eq!((kernel, launch.grid), (Kernel::GatherRowsVec8, [3, 2, 1]));
        for (table, out) in [
            (table, MatLayout::dense(3, 4096, DType::F32)),
            (MatLayout { offset: 4, ..table }, out),
            (table.slice_cols(0..4092), out.slice_cols(0..4092)),
        ] {
            let (kernel, launch) = choose_gather(table, out);
            assert_eq!((kernel, launch.grid), (Kernel::GatherRows, [3, 1, 1]));
        }
    }
}
