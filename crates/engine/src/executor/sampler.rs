//! From logits to tokens: the device buffers of sampling, and the ops over them.

use bytemuck::Pod;
use lora_core::ops::{LogprobArgs, LogprobOut, SampleArgs, SampleRow, mask_words};
use lora_core::{Backend, DType, Pool, Result, Tensor, View};

use super::sample_inputs::SampleInputs;
use super::step_array::StepArray;
use crate::sampling::{MAX_LOGPROBS, TokenLogprob, TokenLogprobs};

/// Input and output buffers of the sampling ops.
pub struct Sampler<B: Backend> {
    params: StepArray<B>,
    history: StepArray<B>,
    banned: StepArray<B>,
    bias: StepArray<B>,
    masks: StepArray<B>,
    targets: StepArray<B>,
    tokens: Tensor<B>,
    target_logprob: Tensor<B>,
    rank: Tensor<B>,
    top_ids: Tensor<B>,
    top: Tensor<B>,
}

impl<B: Backend> Sampler<B> {
    /// Allocates buffers for up to `rows` rows of logits over `vocab` tokens.
    ///
    /// # Errors
    /// [`lora_core::Error::OutOfMemory`].
    pub fn new(be: &B, rows: usize, vocab: usize) -> Result<Self> {
        let out = |r, c, dtype| Tensor::zeros(be, Pool::Activations, r, c, dtype);
        let most = MAX_LOGPROBS.min(vocab);
        Ok(Self {
            params: StepArray::new(be, rows * SampleRow::WORDS)?,
            history: StepArray::new(be, rows)?,
            banned: StepArray::new(be, rows)?,
            bias: StepArray::new(be, rows)?,
            masks: StepArray::new(be, mask_words(vocab))?,
            targets: StepArray::new(be, rows)?,
            tokens: out(1, rows, DType::I32)?,
            target_logprob: out(1, rows, DType::F32)?,
            rank: out(1, rows, DType::I32)?,
            top_ids: out(rows, most, DType::I32)?,
            top: out(rows, most, DType::F32)?,
        })
    }

    /// The sampled tokens on the device, `[1, rows]` i32: the first entries are the last step's, one for
    /// each of its rows of logits.
    pub fn tokens(&self) -> View<'_, B> {
        self.tokens.view()
    }

    /// Samples a token from each row of `logits` and starts its download, which [`Backend::wait`]
    /// completes.
    ///
    /// # Errors
    /// Errors of the backend.
    pub fn sample(
        &mut self,
        be: &B,
        q: &mut B::Queue,
        logits: View<'_, B>,
        inputs: &SampleInputs,
    ) -> Result<B::Download> {
        let (rows, vocab) = (logits.layout.rows, logits.layout.cols);
        self.params.fill(be, q, &inputs.rows)?;
        self.history.fill(be, q, &inputs.history)?;
        self.banned.fill(be, q, &inputs.banned)?;
        self.bias.fill(be, q, &inputs.bias)?;
        self.masks.fill(be, q, &inputs.masks)?;
        let mut out = self.tokens.view_mut();
        out.layout = out.layout.slice_cols(0..rows);
        let args = SampleArgs {
            logits,
            params: self.params.rows_of(SampleRow::WORDS),
            history: self.history.rows_of(2),
            banned: self.banned.view(),
            bias: self.bias.rows_of(2),
            masks: self.masks.rows_of(mask_words(vocab)),
        };
        be.sample(q, args, out)?;
        be.download(q, self.tokens.view().slice_cols(0..rows))
    }

    /// Log-probabilities of `targets` and of the `k` most probable tokens of each row.
    ///
    /// # Errors
    /// Errors of the backend.
    pub fn logprobs(
        &mut self,
        be: &B,
        q: &mut B::Queue,
        logits: View<'_, B>,
        targets: &[i32],
        k: usize,
    ) -> Result<Vec<TokenLogprobs>> {
        let rows = logits.layout.rows;
        let k = k.min(self.top_ids.layout().cols);
        self.targets.fill(be, q, targets)?;
        let mut out = LogprobOut {
            target: self.target_logprob.view_mut(),
            rank: self.rank.view_mut(),
            top_ids: self.top_ids.first_rows_mut(rows),
            top: self.top.first_rows_mut(rows),
        };
        out.target.layout = out.target.layout.slice_cols(0..rows);
        out.rank.layout = out.rank.layout.slice_cols(0..rows);
        out.top_ids.layout = out.top_ids.layout.slice_cols(0..k);
        out.top.layout = out.top.layout.slice_cols(0..k);
        be.logprobs(q, LogprobArgs { logits, targets: self.targets.view() }, out)?;
        let target: Vec<f32> = fetch(be, q, self.target_logprob.view().slice_cols(0..rows))?;
        let rank: Vec<i32> = fetch(be, q, self.rank.view().slice_cols(0..rows))?;
        let ids: Vec<i32> = fetch(be, q, self.top_ids.first_rows(rows).slice_cols(0..k))?;
        let top: Vec<f32> = fetch(be, q, self.top.first_rows(rows).slice_cols(0..k))?;
        let entry = |id: i32, logprob, rank: usize| TokenLogprob {
            id: id as u32,
            logprob,
            rank: rank as u32,
        };
        Ok((0..rows)
            .map(|r| TokenLogprobs {
                token: entry(targets[r], target[r], rank[r] as usize),
                top: (0..k).map(|i| entry(ids[r * k + i], top[r * k + i], i + 1)).collect(),
            })
            .collect())
    }
}

/// Downloads a matrix and waits for it.
///
/// # Errors
/// Errors of the backend.
pub fn fetch<B: Backend, T: Pod>(be: &B, q: &mut B::Queue, view: View<'_, B>) -> Result<Vec<T>> {
    let download = be.download(q, view)?;
    Ok(bytemuck::pod_collect_to_vec(&be.wait(download)?))
}
