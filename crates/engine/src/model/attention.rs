//! The attention of a decoder layer.

use lora_core::ops::{AttentionArgs, KvScales, QkvArgs};
use lora_core::{Backend, Result};

use super::Norm;
use super::pass::Pass;
use super::projection::Projection;
use super::state::{LayerCache, RunState};

/// Grouped-query attention over the KV cache.
pub struct Attention<B: Backend> {
    /// q, k and v, as one projection.
    pub qkv: Projection<B>,
    /// RMS norms over the heads of q and of k, `head_dim` columns each.
    pub qk_norms: Option<(Norm<B>, Norm<B>)>,
    /// Scales of an FP8 KV cache.
    pub kv_scales: KvScales,
    /// Output projection.
    pub o: Projection<B>,
    /// Sliding window in tokens.
    pub window: Option<usize>,
}

impl<B: Backend> Attention<B> {
    /// Computes `x = o(attention(qkv(normed)))`, and writes the rows' keys and values into the layer's cache.
    ///
    /// # Errors
    /// Errors of the backend.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_, B>,
        q: &mut B::Queue,
        state: &mut RunState<B>,
        cache: &mut LayerCache<B>,
    ) -> Result<()> {
        let Pass { be, config, cos_sin_table, tokens_per_block, .. } = *pass;
        let inputs = &state.inputs;
        let (n, lora, dims) = (inputs.extents.rows, inputs.lora(), config.head_dims());
        let normed = state.normed.first_rows(n);
        self.qkv.forward(pass, q, normed, lora, state.qkv.first_rows_mut(n))?;
        let norms = self.qk_norms.as_ref();
        let eps = config.rms_norm_eps;
        be.qk_norm_rope_append(
            q,
            QkvArgs {
                qkv: state.qkv.first_rows_mut(n),
                dims,
                norms: norms.map(|(q, k)| (q.weight(lora), k.weight(lora), eps)),
                positions: inputs.positions(),
                cos_sin_table,
                kv_slots: inputs.kv_slots(),
                k_cache: cache.keys.view_mut(),
                v_cache: cache.values.view_mut(),
                kv_scales: self.kv_scales,
            },
        )?;
        let args = AttentionArgs {
            queries: state.qkv.first_rows(n).slice_cols(0..dims.q_cols()),
            dims,
            k_cache: cache.keys.view(),
            v_cache: cache.values.view(),
            kv_scales: self.kv_scales,
            sequence_of_row: inputs.sequences(),
            positions: inputs.positions(),
            block_tables: inputs.block_tables(),
            tokens_per_block,
            scale: (dims.head_dim as f32).sqrt().recip(),
            window: self.window,
            plan: Some(&inputs.attention),
        };
        be.attention(q, args, state.attended.first_rows_mut(n))?;
        let attended = state.attended.first_rows(n);
        self.o.forward(pass, q, attended, lora, state.x.first_rows_mut(n))
    }
}
