//! A device that computes nothing: what is left is the host's share of a step.

use std::convert::Infallible;
use std::ops::Range;

use crate::fp8::Fp8Scales;
use crate::lora::{LoraBatch, LoraSite, SiteSpec, SlotSlice};
use crate::ops::{AttentionArgs, LogprobArgs, LogprobOut, QkvArgs, SampleArgs, SampleRow};
use crate::{Backend, Caps, Comm, Error, HostTensor, Pool, Result};

type View<'a> = crate::View<'a, NullBackend>;
type ViewMut<'a> = crate::ViewMut<'a, NullBackend>;

/// A device that computes nothing. Small integer matrices can be stored and read back; all others
/// have no memory. Tokens are drawn from a hash of their position and seed, and log-probabilities
/// are zero.
#[derive(Clone, Copy, Debug)]
pub struct NullBackend {
    /// Tokens are drawn below this number.
    pub vocab: u32,
}

/// Memory of a [`NullBackend`].
#[derive(Debug, Default)]
pub struct NullBuf(Vec<u8>);

impl NullBuf {
    fn words(&mut self, cols: usize) -> Option<&mut [i32]> {
        let bytes = self.0.get_mut(..cols * size_of::<i32>())?;
        bytemuck::try_cast_slice_mut(bytes).ok()
    }
}

/// Extents of a weight matrix, `[out, in]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NullLinear {
    rows: usize,
    cols: usize,
}

/// The only rank of its group.
#[derive(Clone, Copy, Debug)]
pub struct NullComm;

impl Comm<NullBackend> for NullComm {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, _: &NullBackend, (): &mut (), _: ViewMut<'_>) -> Result<()> {
        Ok(())
    }
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
    type LoraTable = ();
    type Comm = NullComm;

    fn caps(&self) -> Caps {
        Caps { shares_host_memory: true, ..Caps::default() }
    }

    fn queue(&self) -> Result<()> {
        Ok(())
    }

    fn alloc(&self, pool: Pool, bytes: usize) -> Result<NullBuf> {
        Ok(match pool {
            Pool::StepInputs => NullBuf(vec![0; bytes]),
            // The tokens drawn are read back from here; activations proper would be larger.
            Pool::Activations if bytes <= 1 << 20 => NullBuf(vec![0; bytes]),
            _ => NullBuf::default(),
        })
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    fn upload(&self, (): &mut (), src: &[u8], dst: ViewMut<'_>) -> Result<()> {
        if let Some(bytes) = dst.buf.0.get_mut(..src.len()) {
            bytes.copy_from_slice(src);
        }
        Ok(())
    }

    fn download(&self, (): &mut (), src: View<'_>) -> Result<Vec<u8>> {
        let bytes = src.geo.rows * src.geo.cols * src.geo.dtype.size();
        Ok(src.buf.0.get(..bytes).map_or_else(|| vec![0; bytes], <[u8]>::to_vec))
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
        Ok(NullLinear { rows, cols })
    }

    fn prepare_fp8_linear(
        &self,
        parts: &[HostTensor],
        _: &Fp8Scales,
        bias: Option<&[f32]>,
    ) -> Result<NullLinear> {
        self.prepare_linear(parts, bias)
    }

    fn row_norms(
        &self,
        _: &NullLinear,
        rows: Range<usize>,
        _: (&HostTensor, &HostTensor, f32),
    ) -> Result<Vec<f32>> {
        Ok(vec![1.0; rows.len()])
    }

    fn embed(&self, (): &mut (), table: &NullLinear, _: View<'_>, out: ViewMut<'_>) -> Result<()> {
        crate::check_extent("embed", "columns", out.geo.cols, table.cols)
    }

    fn rms_norm(
        &self,
        (): &mut (),
        _: View<'_>,
        _: View<'_>,
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
        _: View<'_>,
        _: f32,
        _: ViewMut<'_>,
    ) -> Result<()> {
        Ok(())
    }

    fn linear(&self, (): &mut (), x: View<'_>, w: &NullLinear, out: ViewMut<'_>) -> Result<()> {
        crate::check_extent("linear", "input columns", x.geo.cols, w.cols)?;
        crate::check_extent("linear", "output columns", out.geo.cols, w.rows)
    }

    fn qk_norm_rope_append(&self, (): &mut (), _: QkvArgs<'_, Self>) -> Result<()> {
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
            found: args.params.geo.dtype,
            allowed: "int32",
        };
        let size = args.params.geo.rows * size_of::<SampleRow>();
        let Some(bytes) = args.params.buf.0.get(..size) else { return Err(misfit) };
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

    fn lora_table(&self, _: &SiteSpec, _: usize) -> Result<()> {
        Ok(())
    }

    fn write_slot(
        &self,
        (): &mut (),
        _: &mut LoraSite<Self>,
        _: usize,
        _: &[Option<SlotSlice>],
    ) -> Result<()> {
        Ok(())
    }

    fn lora_add(
        &self,
        (): &mut (),
        _: View<'_>,
        _: &LoraSite<Self>,
        _: &LoraBatch<Self>,
        _: ViewMut<'_>,
    ) -> Result<()> {
        Ok(())
    }

    fn lora_embed(
        &self,
        (): &mut (),
        _: View<'_>,
        _: &LoraSite<Self>,
        _: &LoraBatch<Self>,
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
        let be = NullBackend { vocab: 50 };
        let array = |cols| Tensor::zeros(&be, Pool::StepInputs, 1, cols, DType::I32).unwrap();
        let rows: Vec<SampleRow> =
            (0..3).map(|position| SampleRow { position, ..SampleRow::GREEDY }).collect();
        let (mut params, mut out, empty) = (array(3 * SampleRow::WORDS), array(3), array(0));
        be.upload(&mut (), bytemuck::cast_slice(&rows), params.view_mut()).unwrap();
        let mut params = params.view();
        (params.geo.rows, params.geo.cols) = (3, SampleRow::WORDS);
        let (history, banned, masks) = (empty.view(), empty.view(), empty.view());
        let args = SampleArgs { logits: empty.view(), params, history, banned, masks };
        be.sample(&mut (), args, out.view_mut()).unwrap();
        let bytes = be.download(&mut (), out.view()).unwrap();
        let tokens: Vec<i32> = bytemuck::pod_collect_to_vec(&bytes);
        assert_eq!(tokens, [0, 1, 2].map(|i: usize| token(&rows[i], 50)));
        assert!(tokens.iter().all(|token| (0..50).contains(token)));
    }
}
