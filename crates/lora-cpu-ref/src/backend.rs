//! [`CpuRef`]: memory, transfers, and delegation of the trait's methods to [`crate::ops`].

use std::convert::Infallible;
use std::ops::Range;

use lora_core::fp8::Fp8Scales;
use lora_core::lora::{LoraSite, SiteSpec, SlotSlice};
use lora_core::ops::{
    AttentionArgs, AttentionRows, HeadDims, HostUpdate, LogprobArgs, LogprobOut, NormWeight,
    QkvArgs, SampleArgs,
};
use lora_core::{Backend, Caps, Error, HostTensor, Pool, Result, check};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::inner::{Isa, Level};
use crate::memory;
use crate::ops::{activation, attention, embed, linear, logprobs, lora, norm, rope, sample};
use crate::{CpuBuf, CpuLinear, CpuLoraPlan, CpuLoraTable, ThreadComm, View, ViewMut};

/// Blocks smaller than this are allocated without asking the system how much memory is free.
const SMALL: usize = 64 << 20;

/// The CPU as a backend. Ops are complete when they return, so its queues have no state.
pub struct CpuRef {
    isa: Isa,
    /// Keeps the worker threads alive.
    _pool: Option<ThreadPool>,
}

impl CpuRef {
    /// A backend that uses the rayon pool of the calling thread.
    pub fn new() -> Self {
        Self { isa: Isa::detect(), _pool: None }
    }

    /// A backend with its own pool of `threads` threads (one for each core if `None`), including the
    /// calling thread, which must also be the one that uses the backend.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] above [`CpuRef::max_threads`]; [`Error::Device`] if threads cannot be created,
    /// or if the calling thread belongs to another pool.
    pub fn with_threads(threads: Option<usize>) -> Result<Self> {
        let most = Self::max_threads();
        if let Some(threads) = threads.filter(|threads| *threads > most) {
            let (found, limit) = (i64::try_from(threads).unwrap_or(i64::MAX), most + 1);
            return Err(Error::OutOfRange { op: "with_threads", what: "threads", found, limit });
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(0))
            .use_current_thread()
            .build()
            .map_err(|e| Error::Device(format!("cannot make a pool of CPU threads: {e}")))?;
        Ok(Self { isa: Isa::detect(), _pool: Some(pool) })
    }

    /// Maximum number of threads on this machine: four for each core, as more would only take turns, but at
    /// least 64, so that tests with many threads run everywhere.
    pub fn max_threads() -> usize {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        cores.saturating_mul(4).max(64)
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    /// The same backend without the instructions above `level`, to reproduce results of another machine.
    #[must_use]
    pub fn at_most(self, level: Level) -> Self {
        Self { isa: self.isa.at_most(level), ..self }
    }
}

impl Default for CpuRef {
    fn default() -> Self {
        Self::new()
    }
}

impl Backend for CpuRef {
    const NAME: &'static str = crate::NAME;
    type Buf = CpuBuf;
    type Queue = ();
    type Download = Vec<u8>;
    type Graph = Infallible;
    type Linear = CpuLinear;
    type LoraTable = CpuLoraTable;
    type AttentionPlan = ();
    type LoraPlan = CpuLoraPlan;
    type Comm = ThreadComm;

    fn caps(&self) -> Caps {
        Caps {
            graphs: false,
            asynchronous: false,
            wide_activations: true,
            shares_host_memory: true,
            batch_invariant: true,
        }
    }

    fn queue(&self) -> Result<()> {
        Ok(())
    }

    fn alloc(&self, pool: Pool, bytes: usize) -> Result<CpuBuf> {
        let refused = |available| Error::OutOfMemory { pool, requested: bytes, available };
        // Operating systems overcommit memory, so blocks that exceed the free memory are refused here.
        let available = if bytes < SMALL { None } else { memory::available() };
        if available.is_some_and(|free| bytes > free) {
            return Err(refused(available));
        }
        CpuBuf::zeroed(bytes).ok_or_else(|| refused(memory::available()))
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(memory::available())
    }

    fn upload(&self, (): &mut (), src: &[u8], dst: ViewMut<'_>) -> Result<()> {
        check::dense_bytes("upload", dst.layout, src.len())?;
        let start = dst.layout.offset * dst.layout.dtype.size();
        dst.buf.as_mut_slice::<u8>()[start..start + src.len()].copy_from_slice(src);
        Ok(())
    }

    fn download(&self, (): &mut (), src: View<'_>) -> Result<Vec<u8>> {
        let (layout, size) = (src.layout, src.layout.dtype.size());
        let bytes = src.buf.as_slice::<u8>();
        let row = |r: usize| {
            let start = (layout.offset + r * layout.row_stride) * size;
            bytes[start..start + layout.cols * size].iter().copied()
        };
        Ok((0..layout.rows).flat_map(row).collect())
    }

    fn copy_rows(&self, (): &mut (), t: ViewMut<'_>, from: Range<usize>, to: usize) -> Result<()> {
        let (layout, size) = (t.layout, t.layout.dtype.size());
        let count = from.len();
        check::copy_rows(layout, &from, to)?;
        let start = |row: usize| (layout.offset + row * layout.row_stride) * size;
        let bytes = t.buf.as_mut_slice::<u8>();
        for row in 0..count {
            let source = start(from.start + row);
            bytes.copy_within(source..source + layout.cols * size, start(to + row));
        }
        Ok(())
    }

    fn wait(&self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        Ok(bytes)
    }

    fn capture(
        &self,
        (): &mut (),
        _: impl FnOnce(&mut ()) -> Result<()>,
    ) -> Result<Option<Infallible>> {
        Ok(None)
    }

    fn replay(&self, (): &mut (), graph: &Infallible) -> Result<bool> {
        match *graph {}
    }

    fn prepare_linear(&self, parts: &[HostTensor], bias: Option<&[f32]>) -> Result<CpuLinear> {
        linear::prepare(parts, bias)
    }

    fn prepare_fp8_linear(
        &self,
        parts: &[HostTensor],
        scales: &Fp8Scales,
        bias: Option<&[f32]>,
    ) -> Result<CpuLinear> {
        linear::prepare_fp8(parts, scales, bias)
    }

    fn row_norms(
        &self,
        w: &CpuLinear,
        rows: Range<usize>,
        update: HostUpdate<'_>,
    ) -> Result<Vec<f32>> {
        linear::row_norms(self.isa, w, rows, update)
    }

    fn embed(&self, (): &mut (), table: &CpuLinear, ids: View<'_>, out: ViewMut<'_>) -> Result<()> {
        embed::embed(self.isa, table, ids, out)
    }

    fn rms_norm(
        &self,
        (): &mut (),
        x: View<'_>,
        w: NormWeight<'_, Self>,
        eps: f32,
        out: ViewMut<'_>,
    ) -> Result<()> {
        norm::rms_norm(self.isa, x, &w, eps, out)
    }

    fn add_rms_norm(
        &self,
        (): &mut (),
        x: View<'_>,
        residual: ViewMut<'_>,
        w: NormWeight<'_, Self>,
        eps: f32,
        out: ViewMut<'_>,
    ) -> Result<()> {
        norm::add_rms_norm(self.isa, x, residual, &w, eps, out)
    }

    fn linear(&self, (): &mut (), x: View<'_>, w: &CpuLinear, out: ViewMut<'_>) -> Result<()> {
        linear::linear(self.isa, x, w, out)
    }

    fn qk_norm_rope_append(&self, (): &mut (), args: QkvArgs<'_, Self>) -> Result<()> {
        rope::qk_norm_rope_append(self.isa, args)
    }

    fn attention_plan(&self, _: HeadDims, _: usize) -> Result<()> {
        Ok(())
    }

    fn plan_attention(&self, (): &mut (), _: AttentionRows<'_>, (): &mut ()) -> Result<()> {
        Ok(())
    }

    fn attention(
        &self,
        (): &mut (),
        args: AttentionArgs<'_, Self>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        attention::attention(self.isa, &args, out)
    }

    fn silu_mul(&self, (): &mut (), gate_up: View<'_>, out: ViewMut<'_>) -> Result<()> {
        activation::silu_mul(self.isa, gate_up, out)
    }

    fn gather_rows(
        &self,
        (): &mut (),
        x: View<'_>,
        rows: View<'_>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        embed::gather_rows(self.isa, x, rows, out)
    }

    fn sample(&self, (): &mut (), args: SampleArgs<'_, Self>, mut out: ViewMut<'_>) -> Result<()> {
        sample::sample(&args, &mut out)
    }

    fn logprobs(
        &self,
        (): &mut (),
        args: LogprobArgs<'_, Self>,
        out: LogprobOut<'_, Self>,
    ) -> Result<()> {
        logprobs::logprobs(&args, out)
    }

    fn lora_table(&self, spec: &SiteSpec, slots: usize) -> Result<CpuLoraTable> {
        Ok(lora::table(spec, slots))
    }

    fn write_slot(
        &self,
        (): &mut (),
        site: &mut LoraSite<Self>,
        slot: usize,
        slices: &[Option<SlotSlice>],
    ) -> Result<()> {
        lora::write_slot(site, slot, slices)
    }

    fn lora_plan(&self, rows: usize) -> Result<CpuLoraPlan> {
        Ok(CpuLoraPlan::new(rows))
    }

    fn plan_lora(&self, (): &mut (), slots: &[i32], plan: &mut CpuLoraPlan) -> Result<()> {
        plan.fill(slots)
    }

    fn lora_add(
        &self,
        (): &mut (),
        x: View<'_>,
        site: &LoraSite<Self>,
        plan: &CpuLoraPlan,
        out: ViewMut<'_>,
    ) -> Result<()> {
        lora::lora_add(self.isa, x, site, plan, out)
    }

    fn lora_embed(
        &self,
        (): &mut (),
        ids: View<'_>,
        site: &LoraSite<Self>,
        plan: &CpuLoraPlan,
        out: ViewMut<'_>,
    ) -> Result<()> {
        lora::lora_embed(self.isa, ids, site, plan, out)
    }
}
