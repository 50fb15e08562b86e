//! The way from the trait to the ops.

use std::ops::Range;

use cudarc::driver::result;
use lora_core::fp8::Fp8Scales;
use lora_core::lora::{LoraSite, SiteSpec, SlotSlice};
use lora_core::ops::{
    AttentionArgs, AttentionRows, HeadDims, LogprobArgs, LogprobOut, NormWeight, QkvArgs,
    SampleArgs,
};
use lora_core::{Backend, Caps, HostTensor, OneRank, Pool, Result, check};

use crate::error::failed;
use crate::{
    AttentionPlan, Cuda, CudaBuf, CudaDownload, CudaGraph, CudaLinear, CudaLoraPlan, CudaLoraTable,
    CudaQueue, View, ViewMut,
};

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
        q.upload(src, &dst)
    }

    fn download(&self, q: &mut CudaQueue, src: View<'_>) -> Result<CudaDownload> {
        q.download(src)
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
        q.copy_rows(&t, from.start, to, from.len())
    }

    fn capture(
        &self,
        q: &mut CudaQueue,
        record: impl FnOnce(&mut CudaQueue) -> Result<()>,
    ) -> Result<Option<CudaGraph>> {
        self.record(q, record)
    }

    fn replay(&self, q: &mut CudaQueue, graph: &CudaGraph) -> Result<bool> {
        self.start(q, graph)
    }

    fn prepare_linear(&self, parts: &[HostTensor], bias: Option<&[f32]>) -> Result<CudaLinear> {
        self.hold_linear(parts, bias)
    }

    fn prepare_fp8_linear(
        &self,
        parts: &[HostTensor],
        scales: &Fp8Scales,
        bias: Option<&[f32]>,
    ) -> Result<CudaLinear> {
        self.hold_fp8_linear(parts, scales, bias)
    }

    fn row_norms(
        &self,
        w: &CudaLinear,
        rows: Range<usize>,
        low_rank: (&HostTensor, &HostTensor, f32),
    ) -> Result<Vec<f32>> {
        self.norms_of_rows(w, &rows, low_rank)
    }

    fn embed(
        &self,
        q: &mut CudaQueue,
        table: &CudaLinear,
        ids: View<'_>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        self.embed_rows(q, table, ids, &out)
    }

    fn rms_norm(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: NormWeight<'_, Self>,
        eps: f32,
        out: ViewMut<'_>,
    ) -> Result<()> {
        self.norm(q, (x, &w), eps, &out)
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
        self.add_norm(q, (x, &w), eps, [&residual, &out])
    }

    fn linear(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        out: ViewMut<'_>,
    ) -> Result<()> {
        self.multiply(q, x, w, &out)
    }

    fn qk_norm_rope_append(&self, q: &mut CudaQueue, args: QkvArgs<'_, Self>) -> Result<()> {
        self.rotate(q, &args)
    }

    fn attention_plan(&self, dims: HeadDims, rows: usize) -> Result<AttentionPlan> {
        self.room_for_plans(dims, rows)
    }

    fn plan_attention(
        &self,
        q: &mut CudaQueue,
        rows: AttentionRows<'_>,
        plan: &mut AttentionPlan,
    ) -> Result<()> {
        self.plan_rows(q, rows, plan)
    }

    fn attention(
        &self,
        q: &mut CudaQueue,
        args: AttentionArgs<'_, Self>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        self.attend(q, &args, &out)
    }

    fn silu_mul(&self, q: &mut CudaQueue, gate_up: View<'_>, out: ViewMut<'_>) -> Result<()> {
        self.gate(q, gate_up, &out)
    }

    fn gather_rows(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        rows: View<'_>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        self.pick_rows(q, x, rows, &out)
    }

    fn sample(
        &self,
        q: &mut CudaQueue,
        args: SampleArgs<'_, Self>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        self.draw(q, &args, &out)
    }

    fn logprobs(
        &self,
        q: &mut CudaQueue,
        args: LogprobArgs<'_, Self>,
        out: LogprobOut<'_, Self>,
    ) -> Result<()> {
        self.log_softmax(q, &args, &out)
    }

    fn lora_table(&self, spec: &SiteSpec, slots: usize) -> Result<CudaLoraTable> {
        self.empty_table(spec, slots)
    }

    fn write_slot(
        &self,
        q: &mut CudaQueue,
        site: &mut LoraSite<Self>,
        slot: usize,
        slices: &[Option<SlotSlice>],
    ) -> Result<()> {
        self.fill_slot(q, site, slot, slices)
    }

    fn lora_plan(&self, rows: usize) -> Result<CudaLoraPlan> {
        CudaLoraPlan::new(self, rows)
    }

    fn plan_lora(&self, q: &mut CudaQueue, slots: &[i32], plan: &mut CudaLoraPlan) -> Result<()> {
        plan.fill(self, q, slots)
    }

    fn lora_add(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        site: &LoraSite<Self>,
        plan: &CudaLoraPlan,
        out: ViewMut<'_>,
    ) -> Result<()> {
        self.add_lora(q, x, site, plan, &out)
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
            Some(lora) => self.multiply_and_add(q, x, w, lora, &out),
            None => self.multiply(q, x, w, &out),
        }
    }

    fn gated_linear_lora(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        lora: Option<(&LoraSite<Self>, &CudaLoraPlan)>,
        mut gate_up: ViewMut<'_>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        if self.multiply_and_gate(q, x, w, lora, &gate_up, &out)? {
            return Ok(());
        }
        self.linear_lora(q, x, w, lora, gate_up.reborrow())?;
        self.silu_mul(q, gate_up.as_view(), out)
    }

    fn lora_embed(
        &self,
        q: &mut CudaQueue,
        ids: View<'_>,
        site: &LoraSite<Self>,
        plan: &CudaLoraPlan,
        out: ViewMut<'_>,
    ) -> Result<()> {
        self.add_lora_rows(q, ids, site, plan, &out)
    }
}
