//! Memory of the forward pass: KV cache, step inputs and activations, allocated once at start.

use std::ops::Range;

use bytemuck::cast_slice;
use lora_core::lora::LoraPlan;
use lora_core::ops::{AttentionRows, HeadDims};
use lora_core::{Backend, DType, MatLayout, Pool, Result, Tensor, View};

use super::ModelConfig;
use crate::kv::{BlockCopy, BlockId};

/// The paged KV cache of all layers.
pub struct KvCache<B: Backend> {
    /// The cache of each layer.
    pub layers: Vec<LayerCache<B>>,
    /// Tokens per block.
    pub tokens_per_block: usize,
}

/// Keys and values of one layer: `[blocks * tokens_per_block, kv_heads * head_dim]` each.
pub struct LayerCache<B: Backend> {
    /// Keys.
    pub keys: Tensor<B>,
    /// Values.
    pub values: Tensor<B>,
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
        let layers = (0..config.layers)
            .map(|_| Ok(LayerCache { keys: cache()?, values: cache()? }))
            .collect::<Result<_>>()?;
        Ok(Self { layers, tokens_per_block })
    }

    /// Copies the first tokens of blocks to other blocks in all layers, in the order given.
    ///
    /// # Errors
    /// Errors of the backend.
    pub fn copy_blocks(&mut self, be: &B, q: &mut B::Queue, copies: &[BlockCopy]) -> Result<()> {
        for copy in copies.iter().filter(|copy| copy.from != copy.to) {
            let first_row = |block: BlockId| block as usize * self.tokens_per_block;
            let (from, to) = (first_row(copy.from), first_row(copy.to));
            for LayerCache { keys, values } in &mut self.layers {
                be.copy_rows(q, keys.view_mut(), from..from + copy.tokens, to)?;
                be.copy_rows(q, values.view_mut(), from..from + copy.tokens, to)?;
            }
        }
        Ok(())
    }
}

/// Bytes of one KV block over all layers.
pub fn block_bytes(config: &ModelConfig, dtype: DType, tokens_per_block: usize) -> usize {
    2 * config.layers * tokens_per_block * config.kv_heads * config.head_dim * dtype.size()
}

/// The inputs of one step as the host plans them. A row is one token to compute.
#[derive(Clone, Debug, Default)]
pub struct StepRows {
    /// Token id of each row.
    pub ids: Vec<i32>,
    /// Position of each row in its sequence.
    pub positions: Vec<i32>,
    /// Row of the KV caches to which each row writes its key and value; -1 for padding rows.
    pub kv_slots: Vec<i32>,
    /// Sequence of each row, an index into `block_tables`.
    pub sequences: Vec<i32>,
    /// KV blocks of each sequence, `max_blocks` entries each.
    pub block_tables: Vec<i32>,
    /// Entries of one block table.
    pub max_blocks: usize,
    /// Adapter slot of each row; -1 for the base model.
    pub lora_slots: Vec<i32>,
    /// Rows whose logits are computed.
    pub logit_rows: Vec<i32>,
    /// For the first rows: which token of the previous step's sampling replaces their entry of `ids`,
    /// as an index into its rows of logits. Filled by overlap scheduling, where the host has not read
    /// those tokens yet; empty otherwise.
    pub sampled_from: Vec<i32>,
}

/// Shape of a step; part of the CUDA graph key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Extents {
    /// Rows.
    pub rows: usize,
    /// Rows of logits.
    pub logit_rows: usize,
    /// Sequences, one block table each.
    pub sequences: usize,
    /// Entries of one block table.
    pub max_blocks: usize,
}

impl StepRows {
    /// Shape of the step.
    pub fn extents(&self) -> Extents {
        Extents {
            rows: self.ids.len(),
            logit_rows: self.logit_rows.len(),
            sequences: self.block_tables.len() / self.max_blocks.max(1),
            max_blocks: self.max_blocks,
        }
    }

    /// Widens every block table to `max_blocks` entries, at least as many as now.
    pub fn widen_tables(&mut self, max_blocks: usize) {
        let old = self.max_blocks.max(1);
        let widened = |table: &[i32]| {
            let more = std::iter::repeat_n(0, max_blocks - table.len());
            table.iter().copied().chain(more).collect::<Vec<_>>()
        };
        self.block_tables = self.block_tables.chunks_exact(old).flat_map(widened).collect();
        self.max_blocks = max_blocks;
    }

    /// Pads the step to `rows` rows. Each added row is a sequence of its own that reads one token of block 0,
    /// writes no key or value, and has no adapter.
    pub fn pad(&mut self, rows: usize) {
        let Extents { rows: known, sequences, .. } = self.extents();
        for (row, sequence) in (known..rows).zip(sequences..) {
            self.ids.push(0);
            self.positions.push(0);
            self.kv_slots.push(-1);
            self.sequences.push(sequence as i32);
            self.block_tables.extend(std::iter::repeat_n(0, self.max_blocks));
            self.lora_slots.push(-1);
            self.logit_rows.push(row as i32);
        }
    }
}

/// The inputs of a step in device memory, uploaded by one copy. The offset of each array depends on the
/// extents alone, so that CUDA graphs of a shape find the arrays at the same addresses.
pub struct StepInputs<B: Backend> {
    words: Tensor<B>,
    /// [`StepRows::sampled_from`].
    sampled_from: Tensor<B>,
    pub(super) extents: Extents,
    pub(super) attention: B::AttentionPlan,
    lora: B::LoraPlan,
    logit_lora: B::LoraPlan,
}

/// The arrays of a step within the words of [`StepInputs`].
struct InputRanges {
    ids: Range<usize>,
    positions: Range<usize>,
    kv_slots: Range<usize>,
    sequences: Range<usize>,
    logit_rows: Range<usize>,
    block_tables: Range<usize>,
}

impl InputRanges {
    /// One array after another.
    fn of(extents: &Extents) -> Self {
        let mut end = 0;
        let mut next = |words: usize| {
            let start = end;
            end += words;
            start..end
        };
        Self {
            ids: next(extents.rows),
            positions: next(extents.rows),
            kv_slots: next(extents.rows),
            sequences: next(extents.rows),
            logit_rows: next(extents.logit_rows),
            block_tables: next(extents.sequences * extents.max_blocks),
        }
    }

    /// Words of all arrays together.
    fn len(&self) -> usize {
        self.block_tables.end
    }
}

/// A row as a column.
fn column(row: MatLayout) -> MatLayout {
    MatLayout { rows: row.cols, cols: 1, row_stride: 1, ..row }
}

impl<B: Backend> StepInputs<B> {
    /// Allocates inputs for steps of up to these extents.
    fn new(be: &B, dims: HeadDims, most: &Extents) -> Result<Self> {
        let words = InputRanges::of(most).len();
        Ok(Self {
            words: Tensor::zeros(be, Pool::StepInputs, 1, words, DType::I32)?,
            sampled_from: Tensor::zeros(be, Pool::StepInputs, 1, most.logit_rows, DType::I32)?,
            extents: Extents::default(),
            attention: be.attention_plan(dims, most.rows)?,
            lora: be.lora_plan(most.rows)?,
            logit_lora: be.lora_plan(most.logit_rows)?,
        })
    }

    /// Uploads a step's rows. `tokens` are the previous step's sampled tokens, `[1, rows]`.
    pub(super) fn fill(
        &mut self,
        be: &B,
        q: &mut B::Queue,
        rows: &StepRows,
        tokens: View<'_, B>,
    ) -> Result<()> {
        self.extents = rows.extents();
        let words = [
            &rows.ids[..],
            &rows.positions,
            &rows.kv_slots,
            &rows.sequences,
            &rows.logit_rows,
            &rows.block_tables,
        ]
        .concat();
        let mut view = self.words.view_mut();
        view.layout = view.layout.slice_cols(0..words.len());
        be.upload(q, cast_slice(&words), view)?;
        let of_rows = AttentionRows {
            sequences: &rows.sequences,
            positions: &rows.positions,
            table_stride: rows.max_blocks,
        };
        be.plan_attention(q, of_rows, &mut self.attention)?;
        be.plan_lora(q, &rows.lora_slots, &mut self.lora)?;
        let of_logits: Vec<i32> =
            rows.logit_rows.iter().map(|r| rows.lora_slots[*r as usize]).collect();
        be.plan_lora(q, &of_logits, &mut self.logit_lora)?;
        self.gather_sampled(be, q, &rows.sampled_from, tokens)
    }

    /// Gathers the ids of the first rows from `tokens`, the previous step's sampled tokens, on the
    /// device: the host has not read them yet.
    fn gather_sampled(
        &mut self,
        be: &B,
        q: &mut B::Queue,
        sampled_from: &[i32],
        mut tokens: View<'_, B>,
    ) -> Result<()> {
        if sampled_from.is_empty() {
            return Ok(());
        }
        let mut indices = self.sampled_from.view_mut();
        indices.layout = indices.layout.slice_cols(0..sampled_from.len());
        be.upload(q, cast_slice(sampled_from), indices)?;
        // `ids` is the first section of `words`.
        let mut ids = self.words.view_mut();
        ids.layout = column(ids.layout.slice_cols(0..sampled_from.len()));
        tokens.layout = column(tokens.layout);
        be.gather_rows(q, tokens, self.sampled_from.view().slice_cols(0..sampled_from.len()), ids)
    }

    /// Adapters of the rows; `None` if no row has one, so that the base model alone pays nothing for LoRA.
    pub(super) fn lora(&self) -> Option<&B::LoraPlan> {
        Some(&self.lora).filter(|plan| plan.has_adapters())
    }

    /// The same for the rows of logits.
    pub(super) fn logit_lora(&self) -> Option<&B::LoraPlan> {
        Some(&self.logit_lora).filter(|plan| plan.has_adapters())
    }

    fn array(&self, range: impl FnOnce(InputRanges) -> Range<usize>) -> View<'_, B> {
        self.words.view().slice_cols(range(InputRanges::of(&self.extents)))
    }

    pub(super) fn ids(&self) -> View<'_, B> {
        self.array(|ranges| ranges.ids)
    }

    pub(super) fn positions(&self) -> View<'_, B> {
        self.array(|ranges| ranges.positions)
    }

    pub(super) fn kv_slots(&self) -> View<'_, B> {
        self.array(|ranges| ranges.kv_slots)
    }

    pub(super) fn sequences(&self) -> View<'_, B> {
        self.array(|ranges| ranges.sequences)
    }

    pub(super) fn logit_rows(&self) -> View<'_, B> {
        self.array(|ranges| ranges.logit_rows)
    }

    /// The block tables: `[sequences, max_blocks]`.
    pub(super) fn block_tables(&self) -> View<'_, B> {
        let Extents { sequences, max_blocks, .. } = self.extents;
        let mut view = self.array(|ranges| ranges.block_tables);
        (view.layout.rows, view.layout.cols) = (sequences, max_blocks);
        view.layout.row_stride = max_blocks;
        view
    }
}

/// Inputs and activations of a step; [`super::Decoder::forward`] shows which op writes which.
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
    /// Shape of the last prepared step.
    pub fn extents(&self) -> Extents {
        self.inputs.extents
    }

    /// Adapters of the rows of the last prepared step.
    pub fn lora(&self) -> &B::LoraPlan {
        &self.inputs.lora
    }

    /// The first `rows` rows of logits of the last step: `[rows, vocab]` f32.
    pub fn logits(&self, rows: usize) -> View<'_, B> {
        self.logits.first_rows(rows)
    }

    /// Bytes of the activations.
    pub fn bytes(&self) -> usize {
        let Self {
            residual, x, normed, qkv, attended, gate_up, activated, gathered, logits, ..
        } = self;
        let all = [residual, x, normed, qkv, attended, gate_up, activated, gathered, logits];
        all.iter().map(|t| t.layout().span() * t.layout().dtype.size()).sum()
    }

    /// Allocates buffers for steps of up to these extents. Inputs of GEMMs (normed, attended and activated
    /// rows) have the given dtype. Outputs of GEMMs that other ops read are f32 if the backend prefers wide
    /// activations.
    ///
    /// # Errors
    /// [`lora_core::Error::OutOfMemory`].
    pub fn new(be: &B, config: &ModelConfig, dtype: DType, most: &Extents) -> Result<Self> {
        let Extents { rows, logit_rows, .. } = *most;
        let activations =
            |rows, cols, dtype| Tensor::zeros(be, Pool::Activations, rows, cols, dtype);
        let act = |cols| activations(rows, cols, dtype);
        let wide_dtype = if be.caps().wide_activations { DType::F32 } else { dtype };
        let wide = |cols| activations(rows, cols, wide_dtype);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        Ok(Self {
            inputs: StepInputs::new(be, config.head_dims(), most)?,
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
