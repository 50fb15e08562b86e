//! A device that computes nothing: what is left is the host's share of a step.

use std::convert::Infallible;
use std::ops::Range;

use super::memory::{CountedBlock, CountedMemory};
use crate::device::fp8::Fp8Scales;
use crate::device::lora::{LoraPlan, LoraSite, SiteSpec, SlotSlice};
use crate::device::ops::{
    AttentionArgs, AttentionRows, HeadDims, HostUpdate, LogprobArgs, LogprobOut, NormWeight,
    QkvArgs, SampleArgs, SampleRow,
};
use crate::{Backend, Caps, Error, HostTensor, OneRank, Pool, Result};

type View<'a> = crate::View<'a, NullBackend>;
type ViewMut<'a> = crate::ViewMut<'a, NullBackend>;

/// A device that computes nothing. Small integer matrices can be stored and read back; all others
/// have no memory. Tokens are drawn from a hash of their position and seed, and log-probabilities
/// are zero.
#[derive(Clone, Debug)]
pub struct NullBackend {
    vocab: u32,
    memory: Option<CountedMemory>,
}

impl NullBackend {
    /// A device that draws tokens below `vocab`.
    pub fn new(vocab: u32) -> Self {
        Self { vocab, memory: None }
    }

    /// The same device with memory of its own, which weights, adapters and buffers take from.
    #[must_use]
    pub fn with_memory(self, memory: CountedMemory) -> Self {
        Self { memory: Some(memory), ..self }
    }

    fn take(&self, pool: Pool, bytes: usize) -> Result<Option<CountedBlock>> {
        self.memory.as_ref().map(|memory| memory.take(pool, bytes)).transpose()
    }
}

/// Memory of a [`NullBackend`].
#[derive(Debug)]
pub struct NullBuf {
    bytes: Vec<u8>,
    _taken: Option<CountedBlock>,
}

impl NullBuf {
    fn words(&mut self, cols: usize) -> Option<&mut [i32]> {
        let bytes = self.bytes.get_mut(..cols * size_of::<i32>())?;
        bytemuck::try_cast_slice_mut(bytes).ok()
    }
}

/// Extents of a weight matrix, `[out, in]`.
#[derive(Debug)]
pub struct NullLinear {
    rows: usize,
    cols: usize,
    _taken: Option<CountedBlock>,
}

/// How many rows a step has, and whether any has an adapter.
#[derive(Debug)]
pub struct NullLoraPlan {
    rows: usize,
    has_adapters: bool,
    capacity: usize,
    _taken: Option<CountedBlock>,
}

impl LoraPlan for NullLoraPlan {
    type Key = ();

    fn rows(&self) -> usize {
        self.rows
    }

    fn has_adapters(&self) -> bool {
        self.has_adapters
    }

    fn key(&self) {}
}

/// What the slots of a site take.
#[derive(Debug)]
pub struct NullLoraTable(Vec<Option<CountedBlock>>);

/// Bytes of an adapter's part of a slice.
fn bytes_of(slice: &SlotSlice) -> usize {
    let factors = slice.low_rank.iter().flat_map(|low| [&low.a, &low.b]);
    let tensors = factors.chain(&slice.replacement).map(|t| t.bytes().len()).sum::<usize>();
    let vectors = [&slice.gain, &slice.shift].into_iter().flatten().map(Vec::len).sum::<usize>();
    tensors + vectors * size_of::<f32>()
}

/// A token that depends on the seed and the position of a draw alone.
fn token(row: &SampleRow, vocab: u32) -> i32 {
    let mixed = (row.position ^ row.seed[0].rotate_left(16)).wrapping_mul(0x9E37_79B9);
    ((mixed ^ (mixed >> 15)) % vocab.max(1)) as i32
}

impl Backend for NullBackend {
    const NAME: &'static str = "null";
    type Buf = NullBuf;
    type Queue = ();
    type Download = Vec<u8>;
    type Graph = Infallible;
    type Linear = NullLinear;
    type LoraTable = NullLoraTable;
    type AttentionPlan = ();
    type LoraPlan = NullLoraPlan;
    type Comm = OneRank;

    fn caps(&self) -> Caps {
        Caps { shares_host_memory: self.memory.is_none(), ..Caps::default() }
    }

    fn queue(&self) -> Result<()> {
        Ok(())
    }

    fn alloc(&self, pool: Pool, bytes: usize) -> Result<NullBuf> {
        let _taken = self.take(pool, bytes)?;
        let bytes = match pool {
            Pool::StepInputs => vec![0; bytes],
            // The tokens drawn are read back from here; activations proper would be larger.
            Pool::Activations if bytes <= 1 << 20 => vec![0; bytes],
            _ => Vec::new(),
        };
        Ok(NullBuf { bytes, _taken })
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(self.memory.as_ref().map(CountedMemory::free))
    }

    fn upload(&self, (): &mut (), src: &[u8], dst: ViewMut<'_>) -> Result<()> {
        if let Some(bytes) = dst.buf.bytes.get_mut(..src.len()) {
            bytes.copy_from_slice(src);
        }
        Ok(())
    }

    fn download(&self, (): &mut (), src: View<'_>) -> Result<Vec<u8>> {
        let bytes = src.layout.rows * src.layout.cols * src.layout.dtype.size();
        Ok(src.buf.bytes.get(..bytes).map_or_else(|| vec![0; bytes], <[u8]>::to_vec))
    }

    fn copy_rows(&self, (): &mut (), _: ViewMut<'_>, _: Range<usize>, _: usize) -> Result<()> {
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

    fn prepare_linear(&self, parts: &[HostTensor], _: Option<&[f32]>) -> Result<NullLinear> {
        let rows = parts.iter().filter_map(|part| part.shape().first()).sum();
        let cols = parts.first().and_then(|part| part.shape().get(1)).copied().unwrap_or(0);
        let bytes = parts.iter().map(|part| part.bytes().len()).sum();
        Ok(NullLinear { rows, cols, _taken: self.take(Pool::Weights, bytes)? })
    }

    fn prepare_fp8_linear(
        &self,
        parts: &[HostTensor],
        _: &Fp8Scales,
        bias: Option<&[f32]>,
    ) -> Result<NullLinear> {
        self.prepare_linear(parts, bias)
    }

    fn row_norms(&self, _: &NullLinear, rows: Range<usize>, _: HostUpdate<'_>) -> Result<Vec<f32>> {
        Ok(vec![1.0; rows.len()])
    }

    fn embed(&self, (): &mut (), table: &NullLinear, _: View<'_>, out: ViewMut<'_>) -> Result<()> {
        crate::check_extent("embed", "columns", out.layout.cols, table.cols)
    }

    fn rms_norm(
        &self,
        (): &mut (),
        _: View<'_>,
        _: NormWeight<'_, Self>,
        _: f32,
        _: ViewMut<'_>,
    ) -> Result<()> {
        Ok(())
    }

    fn add_rms_norm(
        &self,
        (): &mut (),
        _: View<'_>,
        _: ViewMut<'_>,
        _: NormWeight<'_, Self>,
        _: f32,
        _: ViewMut<'_>,
    ) -> Result<()> {
        Ok(())
    }

    fn linear(&self, (): &mut (), x: View<'_>, w: &NullLinear, out: ViewMut<'_>) -> Result<()> {
        crate::check_extent("linear", "input columns", x.layout.cols, w.cols)?;
        crate::check_extent("linear", "output columns", out.layout.cols, w.rows)
    }

    fn qk_norm_rope_append(&self, (): &mut (), _: QkvArgs<'_, Self>) -> Result<()> {
        Ok(())
    }

    fn attention_plan(&self, _: HeadDims, _: usize) -> Result<()> {
        Ok(())
    }

    fn plan_attention(&self, (): &mut (), _: AttentionRows<'_>, (): &mut ()) -> Result<()> {
        Ok(())
    }

    fn attention(&self, (): &mut (), _: AttentionArgs<'_, Self>, _: ViewMut<'_>) -> Result<()> {
        Ok(())
    }

    fn silu_mul(&self, (): &mut (), _: View<'_>, _: ViewMut<'_>) -> Result<()> {
        Ok(())
    }

    fn gather_rows(&self, (): &mut (), _: View<'_>, _: View<'_>, _: ViewMut<'_>) -> Result<()> {
        Ok(())
    }

    fn sample(&self, (): &mut (), args: SampleArgs<'_, Self>, out: ViewMut<'_>) -> Result<()> {
        let misfit = Error::DType {
            op: "sample",
            what: "parameters",
            found: args.params.layout.dtype,
            allowed: "int32",
        };
        let size = args.params.layout.rows * size_of::<SampleRow>();
        let Some(bytes) = args.params.buf.bytes.get(..size) else { return Err(misfit) };
        let Ok(rows) = bytemuck::try_cast_slice::<u8, SampleRow>(bytes) else { return Err(misfit) };
        let Some(tokens) = out.buf.words(rows.len()) else { return Err(misfit) };
        for (out, row) in tokens.iter_mut().zip(rows) {
            *out = token(row, self.vocab);
        }
        Ok(())
    }

    fn logprobs(
        &self,
        (): &mut (),
        _: LogprobArgs<'_, Self>,
        _: LogprobOut<'_, Self>,
    ) -> Result<()> {
        Ok(())
    }

    fn lora_table(&self, _: &SiteSpec, slots: usize) -> Result<NullLoraTable> {
        Ok(NullLoraTable((0..slots).map(|_| None).collect()))
    }

    fn write_slot(
        &self,
        (): &mut (),
        site: &mut LoraSite<Self>,
        slot: usize,
        slices: &[Option<SlotSlice>],
    ) -> Result<()> {
        let bytes = slices.iter().flatten().map(bytes_of).sum();
        let taken = self.take(Pool::Adapters, bytes)?;
        if let Some(held) = site.table.0.get_mut(slot) {
            *held = taken;
        }
        Ok(())
    }

    fn lora_plan(&self, rows: usize) -> Result<NullLoraPlan> {
        let _taken = self.take(Pool::StepInputs, rows * size_of::<i32>())?;
        Ok(NullLoraPlan { rows: 0, has_adapters: false, capacity: rows, _taken })
    }

    fn plan_lora(&self, (): &mut (), slots: &[i32], plan: &mut NullLoraPlan) -> Result<()> {
        crate::check::plan_room("plan_lora", slots.len(), plan.capacity)?;
        plan.rows = slots.len();
        plan.has_adapters = slots.iter().any(|slot| *slot >= 0);
        Ok(())
    }

    fn lora_add(
        &self,
        (): &mut (),
        _: View<'_>,
        _: &LoraSite<Self>,
        _: &NullLoraPlan,
        _: ViewMut<'_>,
    ) -> Result<()> {
        Ok(())
    }

    fn lora_embed(
        &self,
        (): &mut (),
        _: View<'_>,
        _: &LoraSite<Self>,
        _: &NullLoraPlan,
        _: ViewMut<'_>,
    ) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Tensor};

    #[test]
    fn draws_depend_on_seed_and_position_alone() {
        let be = NullBackend::new(50);
        let array = |cols| Tensor::zeros(&be, Pool::StepInputs, 1, cols, DType::I32).unwrap();
        let rows: Vec<SampleRow> =
            (0..3).map(|position| SampleRow { position, ..SampleRow::GREEDY }).collect();
        let (mut params, mut out, empty) = (array(3 * SampleRow::WORDS), array(3), array(0));
        be.upload(&mut (), bytemuck::cast_slice(&rows), params.view_mut()).unwrap();
        let mut params = params.view();
        (params.layout.rows, params.layout.cols) = (3, SampleRow::WORDS);
        let (history, banned, bias, masks) =
            (empty.view(), empty.view(), empty.view(), empty.view());
        let args = SampleArgs { logits: empty.view(), params, history, banned, bias, masks };
        be.sample(&mut (), args, out.view_mut()).unwrap();
        let bytes = be.download(&mut (), out.view()).unwrap();
        let tokens: Vec<i32> = bytemuck::pod_collect_to_vec(&bytes);
        assert_eq!(tokens, [0, 1, 2].map(|i: usize| token(&rows[i], 50)));
        assert!(tokens.iter().all(|token| (0..50).contains(token)));
    }
}
