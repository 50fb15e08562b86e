//! Looking rows up, and the gate of an MLP.
#![allow(unsafe_code)]

use lora_core::{DType, MatLayout, Result, check};

use super::linear::CudaLinear;
use super::{EIGHT, ROW_THREADS, in_eights};
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::memory::queue::Launch;
use crate::{Cuda, CudaQueue, View, ViewMut};

#[repr(C)]
#[derive(Clone, Copy)]
struct GatherArgs {
    table: MatArg,
    out: MatArg,
    ids: Address,
}

// SAFETY: laid out as `GatherArgs` of `rows.cu`.
unsafe impl KernelArgs for GatherArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::GatherRows, Kernel::GatherRowsEights];
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GateArgs {
    gate_up: MatArg,
    out: MatArg,
}

// SAFETY: laid out as `GateArgs` of `rows.cu`.
unsafe impl KernelArgs for GateArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::SiluMul, Kernel::SiluMulEights];
}

impl Cuda {
    /// See [`lora_core::Backend::embed`].
    pub(crate) fn embed_rows(
        &self,
        q: &mut CudaQueue,
        table: &CudaLinear,
        ids: View<'_>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        const OP: &str = "embed";
        let layout = table.layout();
        check::float(OP, "table", layout.dtype)?;
        check::embed(layout.cols, ids.layout, out.layout)?;
        self.check_ids(q, [OP, "token id"], ids, layout.rows)?;
        self.look_up(q, (table.weights(), layout), ids, (out.into(), out.layout))
    }

    /// See [`lora_core::Backend::gather_rows`].
    pub(crate) fn pick_rows(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        rows: View<'_>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        check::gather_rows(x.layout, rows.layout, out.layout)?;
        self.check_ids(q, ["gather_rows", "row"], rows, x.layout.rows)?;
        let (from, to) = (as_bits(x.layout), as_bits(out.layout));
        self.look_up(q, (MatArg::new(x.buf, from), from), rows, (MatArg::new(out.buf, to), to))
    }

    fn look_up(
        &self,
        q: &mut CudaQueue,
        (table, layout): (MatArg, MatLayout),
        ids: View<'_>,
        (out, out_geo): (MatArg, MatLayout),
    ) -> Result<()> {
        let args = GatherArgs { table, out, ids: MatArg::from(ids).data() };
        let (kernel, launch) = choose_gather(layout, out_geo);
        q.launch(&self.modules, kernel, launch, args)
    }

    /// See [`lora_core::Backend::silu_mul`].
    pub(crate) fn gate(
        &self,
        q: &mut CudaQueue,
        gate_up: View<'_>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        check::silu_mul(gate_up.layout, out.layout)?;
        let (kernel, launch) = choose_gate(gate_up.layout, out.layout);
        let args = GateArgs { gate_up: gate_up.into(), out: out.into() };
        q.launch(&self.modules, kernel, launch, args)
    }
}

/// The same matrix for a kernel that only moves its elements: integers go as the bits of floats.
fn as_bits(layout: MatLayout) -> MatLayout {
    match layout.dtype {
        DType::I32 => MatLayout { dtype: DType::F32, ..layout },
        _ => layout,
    }
}

/// Whether rows can be worked on in vec8 from their beginning to their end.
fn suited(input: MatLayout, out: MatLayout) -> bool {
    in_eights(&[input, out]) && out.cols.is_multiple_of(EIGHT)
}

/// Blocks for all rows of `out`, with `columns` of them a thread.
fn launch(out: MatLayout, columns: usize) -> Launch {
    Launch::new([out.rows, out.cols.div_ceil(columns * ROW_THREADS), 1], ROW_THREADS)
}

fn choose_gather(table: MatLayout, out: MatLayout) -> (Kernel, Launch) {
    match suited(table, out) {
        true => (Kernel::GatherRowsEights, launch(out, EIGHT)),
        false => (Kernel::GatherRows, Launch::new([out.rows, 1, 1], ROW_THREADS)),
    }
}

fn choose_gate(gate_up: MatLayout, out: MatLayout) -> (Kernel, Launch) {
    match suited(gate_up, out) {
        true => (Kernel::SiluMulEights, launch(out, EIGHT)),
        false => (Kernel::SiluMul, launch(out, 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_one_16_bit_dtype_are_gathered_in_eights() {
        let table = MatLayout::dense(1000, 4096, DType::Bf16);
        let out = MatLayout::dense(3, 4096, DType::Bf16);
        let (kernel, launch) = choose_gather(table, out);
        assert_eq!((kernel, launch.grid), (Kernel::GatherRowsEights, [3, 2, 1]));
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
