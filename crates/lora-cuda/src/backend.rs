//! The [`Backend`] trait by the functions of the ops.

use std::ops::Range;

use cudarc::driver::result;
use lora_core::fp8::Fp8Scales;
use lora_core::lora::{LoraSite, SiteSpec, SlotSlice};
use lora_core::ops::{
    AttentionArgs, AttentionRows, HeadDims, HostUpdate, LogprobArgs, LogprobOut, NormWeight,
    QkvArgs, SampleArgs,
};
use lora_core::{Backend, Caps, HostTensor, OneRank, Pool, Result, check};

use crate::device::{Cuda, View, ViewMut};
use crate::error::failed;
use crate::graph::{self, CudaGraph};
use crate::memory::buffer::CudaBuf;
use crate::memory::download::CudaDownload;
use crate::memory::queue::CudaQueue;
use crate::ops::attention::plan::{self as attention_plan, AttentionPlan};
use crate::ops::linear::weights::{self, CudaLinear};
use crate::ops::linear::{self, row_norms};
use crate::ops::lora::plan::{self as lora_plan, CudaLoraPlan};
use crate::ops::lora::table::{self, CudaLoraTable};
use crate::ops::lora::{self, Lora, gated};
use crate::ops::{attention, logprobs, norm, rope, rows, sample};

impl Backend for Cuda {
    const NAME: &'static str = "cuda";
    type Buf = CudaBuf;
    type Queue = CudaQueue;
    type Download = CudaDownload;
    type Graph = CudaGraph;
    type Linear = CudaLinear;
    type LoraTable = CudaLoraTable;
    type AttentionPlan = AttentionPlan;
    type LoraPlan = CudaLoraPlan;
    type Comm = OneRank;

    fn caps(&self) -> Caps {
        Caps {
            graphs: true,
            asynchronous: true,
            wide_activations: false,
            shares_host_memory: false,
            batch_invariant: false,
        }
    }

    fn queue(&self) -> Result<CudaQueue> {
        CudaQueue::new(&self.context)
    }

    fn alloc(&self, pool: Pool, bytes: usize) -> Result<CudaBuf> {
        CudaBuf::zeroed(&self.context, pool, bytes)
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        let (free, _) = result::mem_get_info().map_err(failed("cuMemGetInfo"))?;
        Ok(Some(free))
    }

    fn upload(&self, q: &mut CudaQueue, src: &[u8], dst: ViewMut<'_>) -> Result<()> {
        check::dense_bytes("upload", dst.layout, src.len())?;
        q.upload(src, (&dst).into())
    }

    fn download(&self, q: &mut CudaQueue, src: View<'_>) -> Result<CudaDownload> {
        q.download(src.into())
    }

    fn wait(&self, download: CudaDownload) -> Result<Vec<u8>> {
        download.wait()
    }

    fn copy_rows(
        &self,
        q: &mut CudaQueue,
        t: ViewMut<'_>,
        from: Range<usize>,
        to: usize,
    ) -> Result<()> {
        check::copy_rows(t.layout, &from, to)?;
        q.copy_rows((&t).into(), from, to)
    }

    fn capture(
        &self,
        q: &mut CudaQueue,
        record: impl FnOnce(&mut CudaQueue) -> Result<()>,
    ) -> Result<Option<CudaGraph>> {
        graph::capture(&self.context, self.epoch.get(), q, record)
    }

    fn replay(&self, q: &mut CudaQueue, graph: &CudaGraph) -> Result<bool> {
        graph::replay(self.epoch.get(), q, graph)
    }

    fn prepare_linear(&self, parts: &[HostTensor], bias: Option<&[f32]>) -> Result<CudaLinear> {
        weights::prepare_linear(self, parts, bias)
    }

    fn prepare_fp8_linear(
        &self,
        parts: &[HostTensor],
        scales: &Fp8Scales,
        bias: Option<&[f32]>,
    ) -> Result<CudaLinear> {
        weights::prepare_fp8_linear(self, parts, scales, bias)
    }

    fn row_norms(
        &self,
        w: &CudaLinear,
        rows: Range<usize>,
        update: HostUpdate<'_>,
    ) -> Result<Vec<f32>> {
        row_norms::row_norms(self, w, &rows, update)
    }

    fn embed(
        &self,
        q: &mut CudaQueue,
        table: &CudaLinear,
        ids: View<'_>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        rows::embed(self, q, table, ids, &out)
    }

    fn rms_norm(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: NormWeight<'_, Self>,
        eps: f32,
        out: ViewMut<'_>,
    ) -> Result<()> {
        norm::rms_norm(self, q, x, &w, eps, &out)
    }

    fn add_rms_norm(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        residual: ViewMut<'_>,
        w: NormWeight<'_, Self>,
        eps: f32,
        out: ViewMut<'_>,
    ) -> Result<()> {
        norm::add_rms_norm(self, q, x, &residual, &w, eps, &out)
    }

    fn linear(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        out: ViewMut<'_>,
    ) -> Result<()> {
        linear::linear(self, q, x, w, &out)
    }

    fn qk_norm_rope_append(&self, q: &mut CudaQueue, args: QkvArgs<'_, Self>) -> Result<()> {
        rope::qk_norm_rope_append(self, q, &args)
    }

    fn attention_plan(&self, dims: HeadDims, rows: usize) -> Result<AttentionPlan> {
        attention_plan::attention_plan(self, dims, rows)
    }

    fn plan_attention(
        &self,
        q: &mut CudaQueue,
        rows: AttentionRows<'_>,
        plan: &mut AttentionPlan,
    ) -> Result<()> {
        attention_plan::plan_attention(q, rows, plan)
    }

    fn attention(
        &self,
        q: &mut CudaQueue,
        args: AttentionArgs<'_, Self>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        attention::attention(self, q, &args, &out)
    }

    fn silu_mul(&self, q: &mut CudaQueue, gate_up: View<'_>, out: ViewMut<'_>) -> Result<()> {
        rows::silu_mul(self, q, gate_up, &out)
    }

    fn gather_rows(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        rows: View<'_>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        rows::gather_rows(self, q, x, rows, &out)
    }

    fn sample(
        &self,
        q: &mut CudaQueue,
        args: SampleArgs<'_, Self>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        sample::sample(self, q, &args, &out)
    }

    fn logprobs(
        &self,
        q: &mut CudaQueue,
        args: LogprobArgs<'_, Self>,
        out: LogprobOut<'_, Self>,
    ) -> Result<()> {
        logprobs::logprobs(self, q, &args, &out)
    }

    fn lora_table(&self, spec: &SiteSpec, slots: usize) -> Result<CudaLoraTable> {
        table::lora_table(self, spec, slots)
    }

    fn write_slot(
        &self,
        q: &mut CudaQueue,
        site: &mut LoraSite<Self>,
        slot: usize,
        slices: &[Option<SlotSlice>],
    ) -> Result<()> {
        table::write_slot(self, q, site, slot, slices)
    }

    fn lora_plan(&self, rows: usize) -> Result<CudaLoraPlan> {
        lora_plan::lora_plan(self, rows)
    }

    fn plan_lora(&self, q: &mut CudaQueue, slots: &[i32], plan: &mut CudaLoraPlan) -> Result<()> {
        lora_plan::plan_lora(q, slots, plan)
    }

    fn lora_add(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        site: &LoraSite<Self>,
        plan: &CudaLoraPlan,
        out: ViewMut<'_>,
    ) -> Result<()> {
        lora::lora_add(self, q, x, Lora { site, plan }, &out)
    }

    fn linear_lora(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        lora: Option<(&LoraSite<Self>, &CudaLoraPlan)>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        match lora {
            Some((site, plan)) => lora::linear_lora(self, q, x, w, Lora { site, plan }, &out),
            None => linear::linear(self, q, x, w, &out),
        }
    }

    fn gated_linear_lora(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        lora: Option<(&LoraSite<Self>, &CudaLoraPlan)>,
        gate_up: ViewMut<'_>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        let lora = lora.map(|(site, plan)| Lora { site, plan });
        gated::gated_linear_lora(self, q, x, w, lora, &gate_up, &out)
    }

    fn lora_embed(
        &self,
        q: &mut CudaQueue,
        ids: View<'_>,
        site: &LoraSite<Self>,
        plan: &CudaLoraPlan,
        out: ViewMut<'_>,
    ) -> Result<()> {
        lora::lora_embed(self, q, ids, Lora { site, plan }, &out)
    }
}
