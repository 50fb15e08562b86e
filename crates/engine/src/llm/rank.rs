//! What each rank of an engine puts into its device's memory.

use std::path::PathBuf;

use lora_core::{Backend, Comm, DType, LoraConfig, ModelGeometry, PeftCacheConfig};

use super::buffers::{Buffers, Demand};
use super::checkpoint;
use super::memory::FreeMemory;
use super::settings::{BatchLimits, KvCacheConfig, LoadFormat};
use super::{EngineInfo, LlmError, sizes};
use crate::adapters::TierSize;
use crate::executor::{DeviceExecutor, Parts, StepGraphs};
use crate::kv::KvPlan;
use crate::model::{Decoder, LoadPlan, ModelConfig, Quantization, Shard, WeightSource};
use crate::scheduler::Limits;

/// What the ranks of an engine have in common.
#[derive(Clone)]
pub(super) struct Startup {
    pub model: PathBuf,
    pub load_format: LoadFormat,
    pub dtype: DType,
    pub config: ModelConfig,
    pub geometry: ModelGeometry,
    pub quantization: Quantization,
    pub lora: Option<LoraConfig>,
    pub cache: PeftCacheConfig,
    pub kv: KvCacheConfig,
    pub batch: BatchLimits,
    pub limits: Limits,
    pub cuda_graphs: bool,
}

/// A rank that is ready to run steps.
pub(super) struct Started<B: Backend> {
    pub executor: DeviceExecutor<B>,
    pub info: EngineInfo,
    pub kv: KvPlan,
    /// The host tier and the device tier.
    pub tiers: (TierSize, TierSize),
}

impl Startup {
    /// Opens the weights once more, for another rank.
    ///
    /// # Errors
    /// [`LlmError`] naming what is missing or broken.
    pub fn open_weights(&self) -> Result<Box<dyn WeightSource + Send>, LlmError> {
        checkpoint::open_weights(&self.model, self.load_format)
    }

    /// Puts one rank's share of everything into a device's memory. `report` is called with the layers read
    /// so far.
    ///
    /// # Errors
    /// [`LlmError`] if something does not fit, cannot be read, or another rank fails.
    pub fn start<B: Backend>(
        &self,
        be: B,
        seat: <B::Comm as Comm<B>>::Seat,
        source: Box<dyn WeightSource + Send>,
        report: &dyn Fn(usize),
    ) -> Result<Started<B>, LlmError> {
        let comm = B::Comm::join(&be, seat)?;
        let shard = Shard { rank: comm.rank(), world: comm.world() };
        let mut queue = be.queue()?;
        let lora = self.lora.as_ref();
        let at_start = FreeMemory::of(&be)?;
        sizes::check_slots(lora, &self.geometry, at_start)?;
        let plan = LoadPlan {
            dtype: self.dtype,
            positions: self.batch.max_seq_len.unwrap_or(self.config.max_positions),
            slots: sizes::slots(lora),
            quantization: self.quantization.clone(),
            shard,
        };
        let model = Decoder::load(&be, &mut queue, comm, &self.config, source, &plan, report)?;
        let buffers = self.demand(&be).allocate(&be, &model, at_start)?;
        // All ranks are ready, or none is.
        model.comm.sum_on_host(Vec::new())?;
        let info = self.info::<B>(&buffers);
        let Buffers { kv, tiers, .. } = buffers;
        let executor = DeviceExecutor::new(Parts {
            graphs: StepGraphs::new(&be, self.cuda_graphs),
            kv: buffers.kv_cache,
            state: buffers.state,
            sampler: buffers.sampler,
            be,
            queue,
            model,
        });
        Ok(Started { executor, info, kv, tiers })
    }

    fn demand<B: Backend>(&self, be: &B) -> Demand<'_> {
        // What products round to e4m3 is not rounded before where that costs little: twice rounded,
        // some numbers come out as another code.
        let exact = self.quantization.weights.is_some() && be.caps().wide_activations;
        Demand {
            batch: &self.batch,
            limits: &self.limits,
            kv: &self.kv,
            kv_dtype: self.kv_dtype(),
            activations: if exact { DType::F32 } else { self.dtype },
            lora: self.lora.as_ref(),
            cache: &self.cache,
            geometry: &self.geometry,
        }
    }

    fn kv_dtype(&self) -> DType {
        if self.quantization.fp8_kv { DType::F8E4m3 } else { self.dtype }
    }

    fn info<B: Backend>(&self, buffers: &Buffers<B>) -> EngineInfo {
        EngineInfo {
            model: self.config.clone(),
            geometry: self.geometry.clone(),
            dtype: self.dtype,
            quant_algo: self.quantization.algorithm(),
            kv_dtype: self.kv_dtype(),
            backend: B::NAME,
            max_seq_len: buffers.max_seq_len,
            max_batch_size: self.limits.max_batch_size,
            kv_tokens: buffers.memory.kv_tokens,
            memory: buffers.memory,
        }
    }
}
