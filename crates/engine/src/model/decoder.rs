//! The forward pass of Llama, Mistral, Qwen2 and Qwen3, over any backend.
//!
//! The model contains LoRA sites, but no adapters: which adapter a row uses is an argument of the ops.

use lora_core::lora::{LoraSite, SiteSpec};
use lora_core::{Backend, Comm, DType, Pool, Result, Tensor, View};

use super::checkpoint::loader::{LoadPlan, WeightLoader};
use super::layer::Layer;
use super::pass::Pass;
use super::shard::{NamedPart, Part};
use super::state::{Extents, KvCache, RunState, StepRows};
use super::{ModelConfig, ModelError, Norm, WeightSource};

/// A dense decoder (or one rank's shard of it) in a backend's memory.
pub struct Decoder<B: Backend> {
    /// Shape and hyperparameters of this rank's shard.
    pub config: ModelConfig,
    /// Communicator of the tensor-parallel group.
    pub comm: B::Comm,
    /// Token embedding `[vocab, hidden]`.
    pub embed: B::Linear,
    /// Adapter slots of the embedding, whose input is a token id and whose output is `hidden` wide.
    pub embed_site: LoraSite<B>,
    /// Decoder layers.
    pub layers: Vec<Layer<B>>,
    /// Norm after the last layer, `hidden` columns.
    pub norm: Norm<B>,
    /// `lm_head` `[vocab, hidden]`, or this rank's rows of it; `None` if it is tied to the embedding and not
    /// sharded.
    pub lm_head: Option<B::Linear>,
    /// This rank's rows of `lm_head`.
    pub head_part: Part,
    /// Adapter slots of `lm_head`.
    pub head_site: LoraSite<B>,
    /// Bytes of its weight matrices in their stored dtype.
    pub matrix_bytes: usize,
    cos_sin_table: Tensor<B>,
}

impl<B: Backend> Decoder<B> {
    /// Loads a checkpoint, or one rank's shard of it. `progress` is called after each layer with the number
    /// of layers loaded.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor, or with the device's error.
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
            WeightLoader { be, queue, config, source: source.as_mut(), plan, matrix_bytes: 0 };
        let head_part = plan.shard.part_of_lm_head(config);
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
        let cos_sin_table = upload_cos_sin_table(be, queue, config, plan.positions)?;
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
            cos_sin_table,
        })
    }

    /// The matrix that turns hidden states into logits: `lm_head`, or the embedding if it is tied.
    pub fn lm_head(&self) -> &B::Linear {
        self.lm_head.as_ref().unwrap_or(&self.embed)
    }

    /// Uploads a step's rows. `tokens` are the previous step's sampled tokens, `[1, rows]` i32, from
    /// which rows may take their ids ([`StepRows::sampled_from`]).
    ///
    /// # Errors
    /// Errors of the backend.
    pub fn prepare(
        be: &B,
        q: &mut B::Queue,
        state: &mut RunState<B>,
        rows: &StepRows,
        tokens: View<'_, B>,
    ) -> Result<()> {
        state.inputs.fill(be, q, rows, tokens)
    }

    /// Runs the forward pass of the prepared rows, and writes the requested logits to [`RunState::logits`].
    ///
    /// # Errors
    /// Errors of the backend.
    pub fn forward(
        &self,
        be: &B,
        q: &mut B::Queue,
        state: &mut RunState<B>,
        kv: &mut KvCache<B>,
    ) -> Result<()> {
        let n = state.inputs.extents.rows;
        let pass = Pass {
            be,
            comm: &self.comm,
            config: &self.config,
            cos_sin_table: self.cos_sin_table.view(),
            tokens_per_block: kv.tokens_per_block,
        };
        be.embed(q, &self.embed, state.inputs.ids(), state.residual.first_rows_mut(n))?;
        if let Some(plan) = state.inputs.lora() {
            let ids = state.inputs.ids();
            be.lora_embed(q, ids, &self.embed_site, plan, state.residual.first_rows_mut(n))?;
        }
        if let Some(first) = self.layers.first() {
            let norm = first.input_norm.weight(state.inputs.lora());
            let (residual, normed) = (state.residual.first_rows(n), state.normed.first_rows_mut(n));
            be.rms_norm(q, residual, norm, self.config.rms_norm_eps, normed)?;
        }
        for (i, (layer, cache)) in self.layers.iter().zip(&mut kv.layers).enumerate() {
            let next = self.layers.get(i + 1).map_or(&self.norm, |layer| &layer.input_norm);
            layer.attention.forward(&pass, q, state, cache)?;
            self.add_and_norm(be, q, state, &layer.post_norm)?;
            layer.ffn.forward(&pass, q, state)?;
            self.add_and_norm(be, q, state, next)?;
        }
        self.logits(be, q, state)
    }

    /// `residual += x`, `normed = norm(residual)`.
    fn add_and_norm(
        &self,
        be: &B,
        q: &mut B::Queue,
        state: &mut RunState<B>,
        norm: &Norm<B>,
    ) -> Result<()> {
        let n = state.inputs.extents.rows;
        let weight = norm.weight(state.inputs.lora());
        let (x, residual) = (state.x.first_rows(n), state.residual.first_rows_mut(n));
        let eps = self.config.rms_norm_eps;
        be.add_rms_norm(q, x, residual, weight, eps, state.normed.first_rows_mut(n))
    }

    /// Computes the logits of the requested rows: gathers their hidden states, applies this rank's part of
    /// `lm_head` with adapters, and gathers the vocabulary from all ranks.
    fn logits(&self, be: &B, q: &mut B::Queue, state: &mut RunState<B>) -> Result<()> {
        let inputs = &state.inputs;
        let Extents { rows, logit_rows: n, .. } = inputs.extents;
        let normed = state.normed.first_rows(rows);
        be.gather_rows(q, normed, inputs.logit_rows(), state.gathered.first_rows_mut(n))?;
        let lora = inputs.logit_lora().map(|plan| (&self.head_site, plan));
        let hidden = state.gathered.first_rows(n);
        let mut logits = state.logits.first_rows_mut(n);
        let mut own = logits.reborrow();
        if let Part::Rows(tokens) = &self.head_part {
            own.layout = own.layout.slice_cols(tokens.clone());
        }
        be.linear_lora(q, hidden, self.lm_head(), lora, own)?;
        self.comm.all_gather_cols(be, q, logits)
    }
}

fn upload_cos_sin_table<B: Backend>(
    be: &B,
    q: &mut B::Queue,
    config: &ModelConfig,
    positions: usize,
) -> Result<Tensor<B>> {
    let table = config.rope.cos_sin_table(positions, config.head_dim);
    let mut tensor = Tensor::zeros(be, Pool::Weights, positions, config.head_dim, DType::F32)?;
    be.upload(q, bytemuck::cast_slice(&table), tensor.view_mut())?;
    Ok(tensor)
}
