//! The forward pass of Llama, Mistral, Qwen2 and Qwen3, over any backend.
//!
//! The model knows sites, not adapters: which adapter a row uses is an argument of the ops.

use lora_core::lora::{LoraBatch, LoraSite, SiteSpec};
use lora_core::ops::{AttentionArgs, QkvArgs};
use lora_core::{Backend, Comm, DType, Pool, Result, Tensor, View};

use super::fp8::NamedPart;
use super::layers::{Layer, Loader};
use super::shard::{Part, Shard};
use super::state::{Extents, KvCache, RunState, StepRows};
use super::{ModelConfig, ModelError, Norm, Quantization, WeightSource};

/// A dense decoder in a backend's memory.
pub struct DenseModel<B: Backend> {
    /// Shape and constants of what this device computes.
    pub config: ModelConfig,
    /// The devices that hold the model together.
    pub comm: B::Comm,
    /// Token embedding `[vocab, hidden]`.
    pub embed: B::Linear,
    /// Adapters of the embedding: input is the vocabulary, output the hidden size.
    pub embed_site: LoraSite<B>,
    /// Decoder layers.
    pub layers: Vec<Layer<B>>,
    /// Norm behind the last layer, of `hidden` columns.
    pub norm: Norm<B>,
    /// `lm_head` `[vocab, hidden]`, or this device's rows of it; the embedding serves where there is none.
    pub lm_head: Option<B::Linear>,
    /// Which rows these are.
    pub head_part: Part,
    /// Adapters of the `lm_head`.
    pub head_site: LoraSite<B>,
    /// Bytes of its matrices, as they came from the checkpoint.
    pub matrix_bytes: usize,
    rotations: Tensor<B>,
}

impl<B: Backend> DenseModel<B> {
    /// Reads a checkpoint. `progress` is called after each layer
    /// with the number of layers read.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor, or the device's refusal.
    pub fn load(
        be: &B,
        queue: &mut B::Queue,
        comm: B::Comm,
        config: &ModelConfig,
        mut source: Box<dyn WeightSource>,
        plan: &LoadPlan,
        progress: &dyn Fn(usize),
    ) -> std::result::Result<Self, ModelError> {
        let (vocab, hidden) = (config.vocab, config.hidden);
        let mut loader =
            Loader { be, queue, config, source: source.as_mut(), plan, matrix_bytes: 0 };
        let head_part = plan.shard.part_of_head(config);
        let table = loader.matrix("model.embed_tokens.weight", vocab, hidden)?;
        let embed = loader.prepare(std::slice::from_ref(&table), None)?;
        let lm_head = match (config.tied_embeddings, &head_part) {
            (true, Part::Whole) => None,
            (true, part) => Some(loader.prepare(&[part.of_matrix(table)], None)?),
            (false, part) => {
                let head =
                    NamedPart { name: "lm_head".to_owned(), rows: vocab, part: part.clone() };
                Some(loader.linear(&[head], hidden, None)?)
            }
        };
        let mut layers = Vec::with_capacity(config.layers);
        for i in 0..config.layers {
            layers.push(loader.layer(i)?);
            progress(i + 1);
        }
        let norm = loader.norm("model.norm.weight", hidden)?;
        let embed_site = loader.site(SiteSpec::embedding(vocab, hidden))?;
        let head_site = loader.site(SiteSpec::linear(hidden, &[head_part.rows(vocab)]))?;
        let matrix_bytes = loader.matrix_bytes;
        source.finish(config)?;
        let rotations = upload_rotations(be, queue, config, plan.positions)?;
        Ok(Self {
            config: plan.shard.local(config),
            comm,
            embed,
            embed_site,
            layers,
            norm,
            lm_head,
            head_part,
            head_site,
            matrix_bytes,
            rotations,
        })
    }

    /// The matrix that turns hidden states into logits.
    pub fn head(&self) -> &B::Linear {
        self.lm_head.as_ref().unwrap_or(&self.embed)
    }

    /// Hands a step's rows to the device. `tokens` are those drawn last, `[1, rows]` i32, from which
    /// rows may take theirs ([`StepRows::drawn`]).
    ///
    /// # Errors
    /// Those of the backend.
    pub fn prepare(
        be: &B,
        q: &mut B::Queue,
        state: &mut RunState<B>,
        rows: &StepRows,
        tokens: View<'_, B>,
    ) -> Result<()> {
        state.inputs.fill(be, q, rows, tokens)
    }

    /// Runs the prepared rows, and leaves the logits asked for in [`RunState::logits`].
    ///
    /// # Errors
    /// Those of the backend.
    pub fn forward(
        &self,
        be: &B,
        q: &mut B::Queue,
        state: &mut RunState<B>,
        kv: &mut KvCache<B>,
    ) -> Result<()> {
        let n = state.inputs.extents.rows;
        let lora = active(&state.inputs.lora);
        be.embed(q, &self.embed, state.inputs.ids(), state.residual.head_mut(n))?;
        if let Some(batch) = lora {
            let ids = state.inputs.ids();
            be.lora_embed(q, ids, &self.embed_site, batch, state.residual.head_mut(n))?;
        }
        let eps = self.config.rms_norm_eps;
        if let Some(first) = self.layers.first() {
            let norm = first.input_norm.weight(lora);
            be.rms_norm(q, state.residual.head(n), norm, eps, state.normed.head_mut(n))?;
        }
        for (i, (layer, cache)) in self.layers.iter().zip(&mut kv.layers).enumerate() {
            let next = self.layers.get(i + 1).map_or(&self.norm, |layer| &layer.input_norm);
            self.attention(be, q, layer, state, cache, kv.tokens_per_block)?;
            let lora = active(&state.inputs.lora);
            let (x, post) = (state.x.head(n), layer.post_norm.weight(lora));
            let residual = state.residual.head_mut(n);
            be.add_rms_norm(q, x, residual, post, eps, state.normed.head_mut(n))?;
            mlp((be, &self.comm), q, layer, state)?;
            let (x, next) = (state.x.head(n), next.weight(active(&state.inputs.lora)));
            let residual = state.residual.head_mut(n);
            be.add_rms_norm(q, x, residual, next, eps, state.normed.head_mut(n))?;
        }
        self.logits(be, q, state)
    }

    /// `x = o(attention(qkv(normed)))`.
    fn attention(
        &self,
        be: &B,
        q: &mut B::Queue,
        layer: &Layer<B>,
        state: &mut RunState<B>,
        (k_cache, v_cache): &mut (Tensor<B>, Tensor<B>),
        tokens_per_block: usize,
    ) -> Result<()> {
        let inputs = &state.inputs;
        let (n, lora, dims) = (inputs.extents.rows, active(&inputs.lora), self.config.head_dims());
        layer.qkv.forward(
            (be, &self.comm),
            q,
            state.normed.head(n),
            lora,
            state.qkv.head_mut(n),
        )?;
        let norms = layer.qk_norms.as_ref();
        let eps = self.config.rms_norm_eps;
        be.qk_norm_rope_append(
            q,
            QkvArgs {
                qkv: state.qkv.head_mut(n),
                dims,
                norms: norms.map(|(q, k)| (q.weight(lora), k.weight(lora), eps)),
                positions: inputs.positions(),
                rotations: self.rotations.view(),
                kv_slots: inputs.kv_slots(),
                k_cache: k_cache.view_mut(),
                v_cache: v_cache.view_mut(),
                kv_scales: layer.kv_scales,
            },
        )?;
        let args = AttentionArgs {
            queries: state.qkv.head(n).slice_cols(0..dims.q_cols()),
            dims,
            k_cache: k_cache.view(),
            v_cache: v_cache.view(),
            kv_scales: layer.kv_scales,
            sequence_of_row: inputs.sequences(),
            positions: inputs.positions(),
            block_tables: inputs.block_tables(),
            tokens_per_block,
            scale: (dims.head_dim as f32).sqrt().recip(),
            window: layer.window,
            plan: Some(&inputs.attention),
        };
        be.attention(q, args, state.attended.head_mut(n))?;
        layer.o.forward((be, &self.comm), q, state.attended.head(n), lora, state.x.head_mut(n))
    }

    /// `lm_head(normed)` of the rows asked for.
    fn logits(&self, be: &B, q: &mut B::Queue, state: &mut RunState<B>) -> Result<()> {
        let inputs = &state.inputs;
        let Extents { rows, logit_rows: n, .. } = inputs.extents;
        let normed = state.normed.head(rows);
        be.gather_rows(q, normed, inputs.logit_rows(), state.gathered.head_mut(n))?;
        let lora = active(&inputs.logit_lora).map(|batch| (&self.head_site, batch));
        let hidden = state.gathered.head(n);
        let mut logits = state.logits.head_mut(n);
        let mut own = logits.reborrow();
        if let Part::Rows(tokens) = &self.head_part {
            own.geo = own.geo.slice_cols(tokens.clone());
        }
        be.linear_lora(q, hidden, self.head(), lora, own)?;
        self.comm.all_gather_cols(be, q, logits)
    }
}

/// How a model is to be held in memory.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    /// Dtype of the activations.
    pub dtype: DType,
    /// Longest sequence, in tokens.
    pub positions: usize,
    /// Adapters that can be resident.
    pub slots: usize,
    /// Weights and KV cache in FP8.
    pub quantization: Quantization,
    /// Which part of the model is read.
    pub shard: Shard,
}

/// The batch, if any of its rows has an adapter: rows without one must cost nothing.
fn active<B: Backend>(batch: &LoraBatch<B>) -> Option<&LoraBatch<B>> {
    (batch.segments() > 0).then_some(batch)
}

/// `x = down(silu(gate(normed)) * up(normed))`.
fn mlp<B: Backend>(
    (be, comm): (&B, &B::Comm),
    q: &mut B::Queue,
    layer: &Layer<B>,
    state: &mut RunState<B>,
) -> Result<()> {
    let (n, lora) = (state.inputs.extents.rows, active(&state.inputs.lora));
    let (gate_up, activated) = (state.gate_up.head_mut(n), state.activated.head_mut(n));
    layer.gate_up.forward_gated(be, q, state.normed.head(n), lora, gate_up, activated)?;
    layer.down.forward((be, comm), q, state.activated.head(n), lora, state.x.head_mut(n))
}

fn upload_rotations<B: Backend>(
    be: &B,
    q: &mut B::Queue,
    config: &ModelConfig,
    positions: usize,
) -> Result<Tensor<B>> {
    let table = config.rope.rotations(positions, config.head_dim);
    let mut tensor = Tensor::zeros(be, Pool::Weights, positions, config.head_dim, DType::F32)?;
    be.upload(q, bytemuck::cast_slice(&table), tensor.view_mut())?;
    Ok(tensor)
}
