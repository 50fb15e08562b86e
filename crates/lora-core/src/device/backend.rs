//! The [`Backend`] trait, between models and hardware.

use std::ops::Range;

use super::fp8::Fp8Scales;
use super::lora::{LoraPlan, LoraSite, SiteSpec, SlotSlice};
use super::ops::{
    AttentionArgs, AttentionRows, HeadDims, HostUpdate, LogprobArgs, LogprobOut, NormWeight,
    QkvArgs, SampleArgs,
};
use super::{Comm, HostTensor, Result, View, ViewMut};

/// The purpose of a block of device memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Pool {
    /// Weights of the base model; live as long as the engine.
    Weights,
    /// Weights of resident adapters.
    Adapters,
    /// Keys and values.
    Kv,
    /// Activations of one step.
    Activations,
    /// Inputs of a step from the host: token ids, positions, block tables, slots.
    StepInputs,
}

/// Capabilities and preferences of a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Caps {
    /// Steps can be recorded and replayed (CUDA graphs).
    pub graphs: bool,
    /// Ops are asynchronous: they return before their work is done, so that the host can launch the next
    /// step while one is computed.
    pub asynchronous: bool,
    /// Outputs of linear layers (queries, keys and values, gate and up, the residual stream) should be
    /// stored in f32, whatever the dtype of their inputs: there is less rounding, and the larger stores
    /// cost little.
    pub wide_activations: bool,
    /// Device memory is host memory, which other programs need, too. No large fraction of it is used unless
    /// the user asks for it.
    pub shares_host_memory: bool,
    /// A row's bits are the same in any batch: the order of summation in linear layers and attention
    /// depends neither on the number of rows nor on their position. Otherwise results differ by rounding.
    pub batch_invariant: bool,
}

/// One device.
///
/// Contract of every op, whichever backend runs it:
/// - it is ordered after the ops issued before it on the same [`Backend::Queue`];
/// - it writes only its out-params and allocates nothing, so addresses are stable and a step can
///   be recorded as a graph;
/// - it accumulates in `f32` and rounds to the out-param's dtype once, when it stores;
/// - a row of the result depends only on that row of the inputs: never on the other rows of the
///   batch, nor on how many there are, but for the rounding of [`Backend::linear`] and
///   [`Backend::attention`] where [`Caps::batch_invariant`] is false;
/// - it checks shapes and dtypes first and, if they are wrong, returns an error without writing.
///
/// A backend lives on the thread that drives it and need not be `Send`.
pub trait Backend: Sized + 'static {
    /// Short name, for messages and reports.
    const NAME: &'static str;
    /// An owning block of device memory; dropping it frees the memory.
    type Buf;
    /// An in-order stream of work, with the scratch memory its ops need.
    type Queue;
    /// Bytes on their way to the host.
    type Download;
    /// A recorded step; uninhabited where [`Caps::graphs`] is false.
    type Graph;
    /// A weight matrix `[out, in]` in the layout the device wants, with its bias if it has one.
    type Linear;
    /// The adapters of one site, a row per slot and slice, in device memory.
    type LoraTable;
    /// Rows of a step as the attention of all layers needs them, uploaded once for each step.
    type AttentionPlan;
    /// Adapters of the rows of a step as the LoRA ops of all layers need them, uploaded once for each step.
    type LoraPlan: LoraPlan;
    /// The group of ranks that this device belongs to.
    type Comm: Comm<Self>;

    /// What the device can do.
    fn caps(&self) -> Caps;

    /// A new queue.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device refuses.
    fn queue(&self) -> Result<Self::Queue>;

    /// Allocates `bytes` zeroed bytes. Only called at start-up and when an adapter is loaded.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]; [`crate::Error::Device`] if the device refuses for another reason.
    fn alloc(&self, pool: Pool, bytes: usize) -> Result<Self::Buf>;

    /// Free memory in bytes; `None` if it is not known.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device refuses.
    fn free_memory(&self) -> Result<Option<usize>>;

    /// Copies a dense little-endian matrix from the host.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] unless `src` has exactly the bytes of `dst`, which must be dense.
    fn upload(&self, q: &mut Self::Queue, src: &[u8], dst: ViewMut<'_, Self>) -> Result<()>;

    /// Starts to copy a matrix to the host. Ops that are issued later may write the matrix.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device refuses.
    fn download(&self, q: &mut Self::Queue, src: View<'_, Self>) -> Result<Self::Download>;

    /// Waits for a download, and returns its bytes, dense.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if any work before the download failed.
    fn wait(&self, download: Self::Download) -> Result<Vec<u8>>;

    /// Copies the rows `from` of `t` to the rows that begin at `to`; the two may not overlap.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if rows lie outside of `t`, or overlap.
    fn copy_rows(
        &self,
        q: &mut Self::Queue,
        t: ViewMut<'_, Self>,
        from: Range<usize>,
        to: usize,
    ) -> Result<()>;

    /// Records the ops that `record` issues, which are not run. They must have run before, with
    /// operands of the same extents. `Ok(None)`: they cannot be recorded, or not now, and the caller
    /// runs them eagerly.
    ///
    /// Of a [`Backend::LoraPlan`], its rows and its [`LoraPlan::key`] are recorded; which row has which adapter is
    /// read from the device at each replay.
    ///
    /// # Errors
    /// Those of the recorded ops.
    fn capture(
        &self,
        q: &mut Self::Queue,
        record: impl FnOnce(&mut Self::Queue) -> Result<()>,
    ) -> Result<Option<Self::Graph>>;

    /// Replays a recorded step on the current contents of its buffers. Returns false without running
    /// anything if adapters that were loaded since need other work than was recorded, or if the device has
    /// too little memory to launch it; the caller then runs the ops.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    fn replay(&self, q: &mut Self::Queue, graph: &Self::Graph) -> Result<bool>;

    /// Prepares a weight matrix from `parts` (each `[out_i, in]`, in a 16- or 32-bit float dtype), stacked
    /// by rows, with an optional bias for all rows. Weights keep their dtype.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] or [`crate::Error::DType`] if the parts or the bias disagree.
    fn prepare_linear(&self, parts: &[HostTensor], bias: Option<&[f32]>) -> Result<Self::Linear>;

    /// As [`Backend::prepare_linear`] for e4m3 parts. The input is rounded to e4m3, too:
    /// `out = (x / s as e4m3) wᵀ * s * scale of the part + bias`, where `s` is the scale of the input.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] or [`crate::Error::DType`] if parts, scales or bias disagree;
    /// [`crate::Error::Unsupported`] if the device does not support e4m3.
    fn prepare_fp8_linear(
        &self,
        parts: &[HostTensor],
        scales: &Fp8Scales,
        bias: Option<&[f32]>,
    ) -> Result<Self::Linear>;

    /// Euclidean norm of each row of `rows` of `w + scale * b a`, the denominator of DoRA
    /// (Liu et al., 2024, equation 5), where e4m3 weights are multiplied by their scale.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if the factors do not fit `w`.
    fn row_norms(
        &self,
        w: &Self::Linear,
        rows: Range<usize>,
        update: HostUpdate<'_>,
    ) -> Result<Vec<f32>>;

    /// `out[i] = table[ids[i]]`. `ids` is `[1, rows]` i32, `out` `[rows, in]`.
    ///
    /// # Errors
    /// [`crate::Error::OutOfRange`] if an id is not a row of the table;
    /// [`crate::Error::DType`] if the table is in e4m3.
    fn embed(
        &self,
        q: &mut Self::Queue,
        table: &Self::Linear,
        ids: View<'_, Self>,
        out: ViewMut<'_, Self>,
    ) -> Result<()>;

    /// `out = x / sqrt(mean(x^2) + eps) * w` for each row (Zhang & Sennrich, 2019), where `w` is the
    /// weight of the row's adapter, or the base model's.
    ///
    /// # Errors
    /// [`crate::Error::Shape`], [`crate::Error::DType`], [`crate::Error::OutOfRange`] for a slot.
    fn rms_norm(
        &self,
        q: &mut Self::Queue,
        x: View<'_, Self>,
        w: NormWeight<'_, Self>,
        eps: f32,
        out: ViewMut<'_, Self>,
    ) -> Result<()>;

    /// `residual += x`, then `out = rms_norm(residual)`; the norm reads the rounded residual.
    ///
    /// # Errors
    /// As [`Backend::rms_norm`].
    fn add_rms_norm(
        &self,
        q: &mut Self::Queue,
        x: View<'_, Self>,
        residual: ViewMut<'_, Self>,
        w: NormWeight<'_, Self>,
        eps: f32,
        out: ViewMut<'_, Self>,
    ) -> Result<()>;

    /// `out = x wᵀ + bias`. `x` is `[rows, in]`, `out` `[rows, out]`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`], [`crate::Error::DType`].
    fn linear(
        &self,
        q: &mut Self::Queue,
        x: View<'_, Self>,
        w: &Self::Linear,
        out: ViewMut<'_, Self>,
    ) -> Result<()>;

    /// Prepares queries and keys and stores keys and values; see [`QkvArgs`].
    ///
    /// # Errors
    /// [`crate::Error::Shape`], [`crate::Error::DType`], [`crate::Error::OutOfRange`].
    fn qk_norm_rope_append(&self, q: &mut Self::Queue, args: QkvArgs<'_, Self>) -> Result<()>;

    /// An empty plan with capacity for `rows` rows.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    fn attention_plan(&self, dims: HeadDims, rows: usize) -> Result<Self::AttentionPlan>;

    /// Plans the attention of a step. The division of work depends on which rows are prompts, which only
    /// the host knows in time. Recorded steps take only plans in which every sequence has a single row.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if the rows exceed the capacity, or if the numbers of sequences and
    /// positions differ.
    fn plan_attention(
        &self,
        q: &mut Self::Queue,
        rows: AttentionRows<'_>,
        plan: &mut Self::AttentionPlan,
    ) -> Result<()>;

    /// Causal attention over paged keys and values; see [`AttentionArgs`]. `out` is
    /// `[rows, heads * head_dim]`, without gaps between rows. Where [`Caps::batch_invariant`] is
    /// false, weights may be rounded to the queries' dtype before they meet the values.
    ///
    /// # Errors
    /// [`crate::Error::Shape`], [`crate::Error::DType`], [`crate::Error::OutOfRange`].
    fn attention(
        &self,
        q: &mut Self::Queue,
        args: AttentionArgs<'_, Self>,
        out: ViewMut<'_, Self>,
    ) -> Result<()>;

    /// `out = silu(gate) * up`, where `gate_up` is `[rows, 2 n]`: gate in the left half, up in the
    /// right; `out` is `[rows, n]`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`], [`crate::Error::DType`].
    fn silu_mul(
        &self,
        q: &mut Self::Queue,
        gate_up: View<'_, Self>,
        out: ViewMut<'_, Self>,
    ) -> Result<()>;

    /// `out[i] = x[rows[i]]`. `rows` is `[1, n]` i32. `x` and `out` are floats, or both are i32.
    ///
    /// # Errors
    /// [`crate::Error::Shape`], [`crate::Error::DType`], [`crate::Error::OutOfRange`].
    fn gather_rows(
        &self,
        q: &mut Self::Queue,
        x: View<'_, Self>,
        rows: View<'_, Self>,
        out: ViewMut<'_, Self>,
    ) -> Result<()>;

    /// Samples a token from each row of logits; see [`SampleArgs`]. `out` is `[1, rows]` i32.
    ///
    /// # Errors
    /// [`crate::Error::Shape`], [`crate::Error::DType`], [`crate::Error::OutOfRange`].
    fn sample(
        &self,
        q: &mut Self::Queue,
        args: SampleArgs<'_, Self>,
        out: ViewMut<'_, Self>,
    ) -> Result<()>;

    /// Log-probabilities of given tokens and of the most likely ones; see [`LogprobArgs`].
    ///
    /// # Errors
    /// [`crate::Error::Shape`], [`crate::Error::DType`], [`crate::Error::OutOfRange`].
    fn logprobs(
        &self,
        q: &mut Self::Queue,
        args: LogprobArgs<'_, Self>,
        out: LogprobOut<'_, Self>,
    ) -> Result<()>;

    /// An empty table of `slots` slots for a site.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    fn lora_table(&self, spec: &SiteSpec, slots: usize) -> Result<Self::LoraTable>;

    /// Puts one adapter's part of a site into a slot (`slices[i]` for the site's slice `i`), or
    /// clears the slot where a slice is `None`. Visible to ops issued after it.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] or [`crate::Error::DType`] if a tensor does not fit the site, which
    /// is checked before the slot is touched; [`crate::Error::OutOfMemory`].
    fn write_slot(
        &self,
        q: &mut Self::Queue,
        site: &mut LoraSite<Self>,
        slot: usize,
        slices: &[Option<SlotSlice>],
    ) -> Result<()>;

    /// Room for plans of up to `rows` rows; a plan of no rows.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    fn lora_plan(&self, rows: usize) -> Result<Self::LoraPlan>;

    /// Plans the adapters of a step. `slots` has the slot of each row's adapter, a negative number for a row
    /// without one.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if there are more rows than there is room for.
    fn plan_lora(
        &self,
        q: &mut Self::Queue,
        slots: &[i32],
        plan: &mut Self::LoraPlan,
    ) -> Result<()>;

    /// Applies each row's adapter to the output of the site's base layer; see [`LoraSite`] for
    /// the formula. Rows with slot -1, and slices that the row's adapter leaves alone, keep their
    /// values to the bit.
    ///
    /// # Errors
    /// [`crate::Error::Shape`], [`crate::Error::DType`], [`crate::Error::OutOfRange`].
    fn lora_add(
        &self,
        q: &mut Self::Queue,
        x: View<'_, Self>,
        site: &LoraSite<Self>,
        plan: &Self::LoraPlan,
        out: ViewMut<'_, Self>,
    ) -> Result<()>;

    /// Applies each row's adapter to looked-up embeddings: as [`Backend::lora_add`] where `x` is
    /// the one-hot row of the token id. `ids` is `[1, rows]` i32.
    ///
    /// # Errors
    /// [`crate::Error::Shape`], [`crate::Error::DType`], [`crate::Error::OutOfRange`].
    fn lora_embed(
        &self,
        q: &mut Self::Queue,
        ids: View<'_, Self>,
        site: &LoraSite<Self>,
        plan: &Self::LoraPlan,
        out: ViewMut<'_, Self>,
    ) -> Result<()>;

    /// [`Backend::linear`], then [`Backend::lora_add`]. The composition is the meaning; a backend
    /// overrides it only to fuse the two.
    ///
    /// # Errors
    /// Those of the two ops.
    fn linear_lora(
        &self,
        q: &mut Self::Queue,
        x: View<'_, Self>,
        w: &Self::Linear,
        lora: Option<(&LoraSite<Self>, &Self::LoraPlan)>,
        mut out: ViewMut<'_, Self>,
    ) -> Result<()> {
        self.linear(q, x, w, out.reborrow())?;
        match lora {
            Some((site, plan)) => self.lora_add(q, x, site, plan, out),
            None => Ok(()),
        }
    }

    /// [`Backend::linear_lora`] to `gate_up`, then [`Backend::silu_mul`] of that. The composition is the
    /// meaning of `out`; a backend overrides it only to fuse the ops, and need not round between them
    /// then. What `gate_up` holds in the end is not defined.
    ///
    /// # Errors
    /// Those of the two ops.
    fn gated_linear_lora(
        &self,
        q: &mut Self::Queue,
        x: View<'_, Self>,
        w: &Self::Linear,
        lora: Option<(&LoraSite<Self>, &Self::LoraPlan)>,
        mut gate_up: ViewMut<'_, Self>,
        out: ViewMut<'_, Self>,
    ) -> Result<()> {
        self.linear_lora(q, x, w, lora, gate_up.reborrow())?;
        self.silu_mul(q, gate_up.as_view(), out)
    }
}
