//! The memory of a forward pass: every activation a named buffer, allocated once.

use bytemuck::{Pod, cast_slice};
use lora_core::lora::LoraBatch;
use lora_core::{Backend, DType, Pool, Result, Tensor, View};

use super::ModelConfig;
use crate::kv::{BlockCopy, BlockId};

/// Keys and values of all layers, in KV blocks.
pub struct KvCache<B: Backend> {
    /// Key and value cache of each layer: `[blocks * tokens_per_block, kv_heads * head_dim]`.
    pub layers: Vec<(Tensor<B>, Tensor<B>)>,
    /// Tokens of one block.
    pub tokens_per_block: usize,
}

impl<B: Backend> KvCache<B> {
    /// Allocates `blocks` blocks of `dtype`, a float or e4m3, in every layer.
    ///
    /// # Errors
    /// [`lora_core::Error::OutOfMemory`].
    pub fn new(
        be: &B,
        config: &ModelConfig,
        dtype: DType,
        blocks: usize,
        tokens_per_block: usize,
    ) -> Result<Self> {
        let cache = || {
            let cols = config.kv_heads * config.head_dim;
            Tensor::zeros(be, Pool::Kv, blocks * tokens_per_block, cols, dtype)
        };
        let layers = (0..config.layers).map(|_| Ok((cache()?, cache()?))).collect::<Result<_>>()?;
        Ok(Self { layers, tokens_per_block })
    }

    /// Copies the beginnings of blocks, in this order, in all layers.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn copy_blocks(&mut self, be: &B, q: &mut B::Queue, copies: &[BlockCopy]) -> Result<()> {
        for copy in copies.iter().filter(|copy| copy.from != copy.to) {
            let first_row = |block: BlockId| block as usize * self.tokens_per_block;
            let (from, to) = (first_row(copy.from), first_row(copy.to));
            for (keys, values) in &mut self.layers {
                be.copy_rows(q, keys.view_mut(), from..from + copy.tokens, to)?;
                be.copy_rows(q, values.view_mut(), from..from + copy.tokens, to)?;
            }
        }
        Ok(())
    }
}

/// Bytes that one KV block takes in all layers together.
pub fn block_bytes(config: &ModelConfig, dtype: DType, tokens_per_block: usize) -> usize {
    2 * config.layers * tokens_per_block * config.kv_heads * config.head_dim * dtype.size()
}

/// What the host decides about the rows of one step.
#[derive(Clone, Debug, Default)]
pub struct StepRows {
    /// Token of each row.
    pub ids: Vec<i32>,
    /// Position of each row in its sequence.
    pub positions: Vec<i32>,
    /// Row of the KV caches that each row writes.
    pub kv_slots: Vec<i32>,
    /// Sequence of each row, an index into `block_tables`.
    pub sequences: Vec<i32>,
    /// KV blocks of each sequence, `max_blocks` entries each.
    pub block_tables: Vec<i32>,
    /// Entries of one block table.
    pub max_blocks: usize,
    /// Slot of each row's adapter, -1 for none.
    pub lora_slots: Vec<i32>,
    /// Rows whose logits are wanted.
    pub logit_rows: Vec<i32>,
}

/// A `[1, capacity]` i32 array that is refilled for each step.
pub struct StepArray<B: Backend> {
    tensor: Tensor<B>,
    len: usize,
}

impl<B: Backend> StepArray<B> {
    /// Room for `capacity` entries.
    ///
    /// # Errors
    /// [`lora_core::Error::OutOfMemory`].
    pub fn new(be: &B, capacity: usize) -> Result<Self> {
        let tensor = Tensor::zeros(be, Pool::StepInputs, 1, capacity, DType::I32)?;
        Ok(Self { tensor, len: 0 })
    }

    /// Replaces the contents, growing the array if it must (only before a graph is captured).
    ///
    /// # Errors
    /// Those of the backend.
    pub fn fill<T: Pod>(&mut self, be: &B, q: &mut B::Queue, values: &[T]) -> Result<()> {
        let words: &[i32] = cast_slice(values);
        if words.len() > self.tensor.geo().cols {
            *self = Self::new(be, words.len().next_power_of_two())?;
        }
        self.len = words.len();
        let mut view = self.tensor.view_mut();
        view.geo = view.geo.slice_cols(0..words.len());
        be.upload(q, cast_slice(words), view)
    }

    /// The current entries: `[1, len]`.
    pub fn view(&self) -> View<'_, B> {
        self.tensor.view().slice_cols(0..self.len)
    }

    /// The current entries as rows of `cols`.
    pub fn rows_of(&self, cols: usize) -> View<'_, B> {
        let mut view = self.tensor.view();
        view.geo.rows = self.len / cols.max(1);
        view.geo.cols = cols;
        view.geo.row_stride = cols;
        view
    }
}

/// Inputs of a step in device memory.
pub struct StepInputs<B: Backend> {
    pub(super) rows: usize,
    pub(super) ids: StepArray<B>,
    pub(super) positions: StepArray<B>,
    pub(super) kv_slots: StepArray<B>,
    pub(super) sequences: StepArray<B>,
    pub(super) block_tables: StepArray<B>,
    pub(super) max_blocks: usize,
    pub(super) logit_rows: StepArray<B>,
    pub(super) lora: LoraBatch<B>,
    pub(super) logit_lora: LoraBatch<B>,
}

/// Activations of a step; see [`super::DenseModel::forward`] for who writes what.
pub struct RunState<B: Backend> {
    pub(super) inputs: StepInputs<B>,
    pub(super) residual: Tensor<B>,
    pub(super) x: Tensor<B>,
    pub(super) normed: Tensor<B>,
    pub(super) qkv: Tensor<B>,
    pub(super) attended: Tensor<B>,
    pub(super) gate_up: Tensor<B>,
    pub(super) activated: Tensor<B>,
    pub(super) gathered: Tensor<B>,
    pub(super) logits: Tensor<B>,
}

impl<B: Backend> RunState<B> {
    /// The first `rows` rows of logits of the last step: `[rows, vocab]` f32.
    pub fn logits(&self, rows: usize) -> View<'_, B> {
        self.logits.head(rows)
    }
    /// What products read (norms, attention, gated MLP) has the dtype asked for; what they write and
    /// other ops read on is f32 where the backend prefers it. Buffers for steps of up to `rows` rows, of which up to `logit_rows` yield logits.
    ///
    /// # Errors
    /// [`lora_core::Error::OutOfMemory`].
    pub fn new(
        be: &B,
        config: &ModelConfig,
        dtype: DType,
        rows: usize,
        logit_rows: usize,
    ) -> Result<Self> {
        let activations =
            |rows, cols, dtype| Tensor::zeros(be, Pool::Activations, rows, cols, dtype);
        let act = |cols| activations(rows, cols, dtype);
        let wide_dtype = if be.caps().wide_activations { DType::F32 } else { dtype };
        let wide = |cols| activations(rows, cols, wide_dtype);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        Ok(Self {
            inputs: StepInputs {
                rows: 0,
                ids: StepArray::new(be, rows)?,
                positions: StepArray::new(be, rows)?,
                kv_slots: StepArray::new(be, rows)?,
                sequences: StepArray::new(be, rows)?,
                block_tables: StepArray::new(be, rows)?,
                max_blocks: 0,
                logit_rows: StepArray::new(be, logit_rows)?,
                lora: LoraBatch::new(be, rows)?,
                logit_lora: LoraBatch::new(be, logit_rows)?,
            },
            residual: wide(config.hidden)?,
            x: wide(config.hidden)?,
            normed: act(config.hidden)?,
            qkv: wide(q + 2 * kv)?,
            attended: act(q)?,
            gate_up: wide(2 * config.intermediate)?,
            activated: act(config.intermediate)?,
            gathered: activations(logit_rows, config.hidden, dtype)?,
            logits: activations(logit_rows, config.vocab, DType::F32)?,
        })
    }
}
