//! Starting one rank: loads its shard of the model and allocates its buffers.

use std::path::PathBuf;

use lora_core::{Backend, Comm, DType, ModelGeometry};

use super::buffers::{BufferSpec, Buffers};
use super::checkpoint;
use super::config::EngineConfig;
use super::memory::FreeMemory;
use super::settings::CudaGraphConfig;
use super::sizes;
use crate::adapters::TierSizes;
use crate::executor::{DeviceExecutor, ExecutorParts, GraphSizes, StepGraphs, padded_rows};
use crate::kv::KvPlan;
use crate::llm::{EngineInfo, LlmError};
use crate::model::{Decoder, LoadPlan, ModelConfig, Quantization, Shard, WeightSource};
use crate::scheduler::Limits;

/// Configuration shared by all ranks of an engine.
#[derive(Clone)]
pub(in crate::llm) struct RankConfig {
    pub model: PathBuf,
    pub settings: EngineConfig,
    /// Configuration of the model.
    pub config: ModelConfig,
    pub geometry: ModelGeometry,
    pub quantization: Quantization,
}

/// A rank that is ready to run steps.
pub(in crate::llm) struct ReadyRank<B: Backend> {
    pub executor: DeviceExecutor<B>,
    pub info: EngineInfo,
    pub kv: KvPlan,
    pub tiers: TierSizes,
}

impl RankConfig {
    /// Opens the weights, once more for each rank.
    ///
    /// # Errors
    /// [`LlmError`] naming what is missing or broken.
    pub fn open_weights(&self) -> Result<Box<dyn WeightSource + Send>, LlmError> {
        checkpoint::open_weights(&self.model, self.settings.load_format)
    }

    /// Limits of the scheduler.
    pub fn limits(&self) -> Limits {
        let lora = self.settings.lora_config.as_ref();
        sizes::limits(&self.settings.batch(), self.settings.scheduler_config, lora)
    }

    /// Dtype of the activations.
    fn dtype(&self) -> DType {
        self.settings.dtype.unwrap_or(self.config.dtype)
    }

    /// Loads one rank's shard and allocates its buffers. `report` is called with the number of layers loaded
    /// so far.
    ///
    /// # Errors
    /// [`LlmError`] if memory is insufficient, a file cannot be read, or another rank fails.
    pub fn start<B: Backend>(
        &self,
        be: B,
        seat: <B::Comm as Comm<B>>::Seat,
        source: Box<dyn WeightSource + Send>,
        report: &dyn Fn(usize),
    ) -> Result<ReadyRank<B>, LlmError> {
        let comm = B::Comm::join(&be, seat)?;
        let shard = Shard { rank: comm.rank(), world: comm.world() };
        let mut queue = be.queue()?;
        let lora = self.settings.lora_config.as_ref();
        let at_start = FreeMemory::of(&be)?;
        sizes::check_slots(lora, &self.geometry, at_start)?;
        let plan = LoadPlan {
            dtype: self.dtype(),
            positions: self.settings.max_seq_len.unwrap_or(self.config.max_positions),
            slots: sizes::slots(lora),
            quantization: self.quantization.clone(),
            shard,
        };
        let model = Decoder::load(&be, &mut queue, comm, &self.config, source, &plan, report)?;
        let buffers = self.buffer_spec(&be).allocate(&be, &model, at_start)?;
        // A barrier: fails if another rank failed, so that all ranks are ready or none is.
        model.comm.sum_on_host(Vec::new())?;
        let info = self.info::<B>(&buffers);
        let Buffers { kv, tiers, .. } = buffers;
        let executor = DeviceExecutor::new(ExecutorParts {
            graphs: StepGraphs::new(&be, self.graph_sizes()),
            kv: buffers.kv_cache,
            state: buffers.state,
            sampler: buffers.sampler,
            be,
            queue,
            model,
        });
        Ok(ReadyRank { executor, info, kv, tiers })
    }

    fn buffer_spec<B: Backend>(&self, be: &B) -> BufferSpec<'_> {
        // FP8 GEMMs quantise their inputs to e4m3. If these were rounded to 16 bits first, double rounding
        // would change some codes. So they stay in f32 where the backend has wide activations anyway.
        let exact = self.quantization.weights.is_some() && be.caps().wide_activations;
        BufferSpec {
            batch: self.settings.batch(),
            limits: self.limits(),
            kv: &self.settings.kv_cache_config,
            kv_dtype: self.kv_dtype(),
            activations: if exact { DType::F32 } else { self.dtype() },
            lora: self.settings.lora_config.as_ref(),
            cache: &self.settings.peft_cache_config,
            geometry: &self.geometry,
        }
    }

    /// Batch sizes for which CUDA graphs are recorded.
    fn graph_sizes(&self) -> Option<GraphSizes> {
        let CudaGraphConfig { batch_sizes, max_batch_size, enable_padding } =
            self.settings.cuda_graph_config.as_ref()?;
        let room = padded_rows(self.settings.max_batch_size);
        let max = max_batch_size.map_or(room, |max| max.min(room));
        Some(GraphSizes::new(batch_sizes.as_deref(), max, *enable_padding))
    }

    fn kv_dtype(&self) -> DType {
        if self.quantization.fp8_kv { DType::F8E4m3 } else { self.dtype() }
    }

    fn info<B: Backend>(&self, buffers: &Buffers<B>) -> EngineInfo {
        EngineInfo {
            model: self.config.clone(),
            geometry: self.geometry.clone(),
            dtype: self.dtype(),
            quant_algo: self.quantization.algorithm(),
            kv_dtype: self.kv_dtype(),
            backend: B::NAME,
            max_seq_len: buffers.max_seq_len,
            max_batch_size: self.settings.max_batch_size,
            kv_tokens: buffers.memory.kv_tokens,
            memory: buffers.memory,
        }
    }
}
