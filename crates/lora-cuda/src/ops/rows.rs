//! Looking rows up, and the gate of an MLP.
#![allow(unsafe_code)]

use lora_core::{Result, check};

use super::linear::CudaLinear;
use super::{EIGHT, ROW_THREADS, in_eights};
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::queue::Launch;
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
    const KERNELS: &'static [Kernel] = &[Kernel::GatherRows];
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
        let geo = table.geo();
        check::float(OP, "table", geo.dtype)?;
        check::gather(OP, geo.cols, ids.geo, out.geo)?;
        self.check_ids(q, [OP, "token id"], ids, geo.rows)?;
        self.look_up(q, table.weights(), ids, out)
    }

    /// See [`lora_core::Backend::gather_rows`].
    pub(crate) fn pick_rows(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        rows: View<'_>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        const OP: &str = "gather_rows";
        check::float(OP, "x", x.geo.dtype)?;
        check::gather(OP, x.geo.cols, rows.geo, out.geo)?;
        self.check_ids(q, [OP, "row"], rows, x.geo.rows)?;
        self.look_up(q, x.into(), rows, out)
    }

    fn look_up(
        &self,
        q: &mut CudaQueue,
        table: MatArg,
        ids: View<'_>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let launch = Launch::new([out.geo.rows, 1, 1], ROW_THREADS);
        let args = GatherArgs { table, out: out.into(), ids: MatArg::from(ids).data() };
        q.launch(&self.modules, Kernel::GatherRows, launch, args)
    }

    /// See [`lora_core::Backend::silu_mul`].
    pub(crate) fn gate(
        &self,
        q: &mut CudaQueue,
        gate_up: View<'_>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        check::silu_mul(gate_up.geo, out.geo)?;
        let eights = in_eights(&[gate_up.geo, out.geo]) && out.geo.cols.is_multiple_of(EIGHT);
        let (kernel, columns) = match eights {
            true => (Kernel::SiluMulEights, EIGHT),
            false => (Kernel::SiluMul, 1),
        };
        let blocks = out.geo.cols.div_ceil(columns * ROW_THREADS);
        let launch = Launch::new([out.geo.rows, blocks, 1], ROW_THREADS);
        let args = GateArgs { gate_up: gate_up.into(), out: out.into() };
        q.launch(&self.modules, kernel, launch, args)
    }
}
