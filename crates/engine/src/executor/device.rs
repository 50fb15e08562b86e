//! The executor of one device.

use std::collections::VecDeque;

use lora_core::{Backend, Comm, Result};

use super::graphs::{GraphStats, StepGraphs};
use super::sampler::{Sampler, fetch};
use super::{Executor, SampleInputs, StepRows, slots};
use crate::adapters::{SiteWrite, WriteError};
use crate::kv::BlockCopy;
use crate::model::{Decoder, KvCache, RunState};
use crate::sampling::TokenLogprobs;

/// The components of a [`DeviceExecutor`], all in the memory of one backend.
pub struct ExecutorParts<B: Backend> {
    /// The device.
    pub be: B,
    /// The stream on which its work is issued.
    pub queue: B::Queue,
    /// Weights and adapter slots.
    pub model: Decoder<B>,
    /// The KV cache.
    pub kv: KvCache<B>,
    /// Inputs and activations of a step.
    pub state: RunState<B>,
    /// CUDA graphs of decode steps.
    pub graphs: StepGraphs<B>,
    /// Inputs and outputs of sampling.
    pub sampler: Sampler<B>,
}

/// Runs steps on one backend, on the thread that made it.
pub struct DeviceExecutor<B: Backend> {
    parts: ExecutorParts<B>,
    sites: usize,
    /// Sampled tokens on their way to the host, one download per step, oldest first.
    sampled: VecDeque<B::Download>,
}

impl<B: Backend> DeviceExecutor<B> {
    /// An executor that has run no step.
    pub fn new(mut parts: ExecutorParts<B>) -> Self {
        let (_, sites) = parts.model.sites_mut();
        let sites = sites.count();
        Self { parts, sites, sampled: VecDeque::new() }
    }

    /// Marks this rank as failed, so that other ranks of the group do not wait for it in collectives.
    pub fn abort(&self) {
        self.parts.model.comm.abort();
    }
}

impl<B: Backend> Executor for DeviceExecutor<B> {
    fn is_asynchronous(&self) -> bool {
        self.parts.be.caps().asynchronous
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<()> {
        let ExecutorParts { be, queue, kv, .. } = &mut self.parts;
        kv.copy_blocks(be, queue, copies)
    }

    fn forward(&mut self, mut rows: StepRows) -> Result<()> {
        let ExecutorParts { be, queue, model, kv, state, graphs, sampler } = &mut self.parts;
        graphs.pad(&mut rows);
        Decoder::prepare(be, queue, state, &rows, sampler.tokens())?;
        graphs.forward(model, be, queue, state, kv)
    }

    fn sample(&mut self, inputs: SampleInputs) -> Result<()> {
        let ExecutorParts { be, queue, state, sampler, .. } = &mut self.parts;
        let logits = state.logits(inputs.rows.len());
        self.sampled.push_back(sampler.sample(be, queue, logits, &inputs)?);
        Ok(())
    }

    fn tokens(&mut self) -> Result<Vec<i32>> {
        let nothing = || lora_core::Error::Device("no step was sampled".to_owned());
        let download = self.sampled.pop_front().ok_or_else(nothing)?;
        Ok(bytemuck::pod_collect_to_vec(&self.parts.be.wait(download)?))
    }

    fn logprobs(&mut self, targets: &[i32], k: usize) -> Result<Vec<TokenLogprobs>> {
        let ExecutorParts { be, queue, state, sampler, .. } = &mut self.parts;
        sampler.logprobs(be, queue, state.logits(targets.len()), targets, k)
    }

    fn logits(&mut self, rows: usize) -> Result<Vec<Vec<f32>>> {
        let ExecutorParts { be, queue, state, .. } = &mut self.parts;
        let logits = state.logits(rows);
        let all: Vec<f32> = fetch(be, queue, logits)?;
        Ok(all.chunks_exact(logits.layout.cols).map(<[f32]>::to_vec).collect())
    }

    fn forget_steps(&mut self) {
        self.sampled.clear();
    }

    fn sites(&self) -> usize {
        self.sites
    }

    fn write_site(&mut self, write: SiteWrite<'_>) -> std::result::Result<usize, WriteError> {
        let ExecutorParts { be, queue, model, .. } = &mut self.parts;
        slots::write_site(be, queue, model, write)
    }

    fn graphs(&self) -> GraphStats {
        self.parts.graphs.stats()
    }
}
