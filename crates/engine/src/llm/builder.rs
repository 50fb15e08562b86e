//! Starting an engine.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use lora_core::{
    Backend, DType, LoraConfig, ModelGeometry, PeftCacheConfig, QuantConfig, Rejection, Rejections,
};

use loramux_moe::{MoeBackend, rules};

use super::adapter_texts::AdapterTexts;
use super::base_model::BaseModel;
use super::buffers::Demand;
use super::checkpoint::Checkpoint;
use super::geometry::geometry;
use super::lora_settings::settle;
use super::memory::FreeMemory;
use super::quantize;
use super::settings::{BatchLimits, KvCacheConfig, LoadFormat, SchedulerConfig};
use super::sizes;
use super::{EngineInfo, Llm, LlmError};
use crate::adapters::{AdapterRegistry, AdapterTiers};
use crate::core::{AdapterStore, Command, Core};
use crate::executor::{DeviceExecutor, Parts, StepGraphs};
use crate::kv::KvBlocks;
use crate::model::{
    DenseModel, LoadPlan, ModelConfig, Quantization, WeightSource, base_weights, dummy_weights,
};
use crate::scheduler::{Limits, Scheduler};

/// Called with the layers read so far and their number.
pub type Progress = Box<dyn Fn(usize, usize) + Send>;

/// Settings of an engine, under the original's names; made by [`Llm::builder`].
pub struct LlmBuilder {
    model: PathBuf,
    tokenizer: Option<PathBuf>,
    dtype: Option<DType>,
    load_format: LoadFormat,
    lora_config: Option<LoraConfig>,
    peft_cache_config: PeftCacheConfig,
    quant_config: Option<QuantConfig>,
    moe_backend: MoeBackend,
    cuda_graphs: bool,
    disable_overlap_scheduler: Option<bool>,
    kv_cache: KvCacheConfig,
    scheduler: SchedulerConfig,
    batch: BatchLimits,
    progress: Progress,
}

impl LlmBuilder {
    pub(super) fn new(model: PathBuf) -> Self {
        Self {
            model,
            tokenizer: None,
            dtype: None,
            load_format: LoadFormat::Auto,
            lora_config: None,
            peft_cache_config: PeftCacheConfig::default(),
            quant_config: None,
            moe_backend: MoeBackend::Auto,
            cuda_graphs: true,
            disable_overlap_scheduler: None,
            kv_cache: KvCacheConfig::default(),
            scheduler: SchedulerConfig::default(),
            batch: BatchLimits::default(),
            progress: Box::new(|_, _| ()),
        }
    }

    /// A folder with `tokenizer.json` and chat template, in place of the model's own.
    #[must_use]
    pub fn tokenizer(mut self, dir: impl Into<PathBuf>) -> Self {
        self.tokenizer = Some(dir.into());
        self
    }

    /// Dtype of the activations; `None` takes the checkpoint's. Weights stay in their stored
    /// 16-bit dtype under `F32`, which is the exact mode.
    #[must_use]
    pub fn dtype(mut self, dtype: Option<DType>) -> Self {
        self.dtype = dtype;
        self
    }

    /// Where weights come from.
    #[must_use]
    pub fn load_format(mut self, format: LoadFormat) -> Self {
        self.load_format = format;
        self
    }

    /// Turns LoRA on.
    #[must_use]
    pub fn lora_config(mut self, config: LoraConfig) -> Self {
        self.lora_config = Some(config);
        self
    }

    /// Sizes of the adapter tiers and threads that read; `max_loras` and `max_cpu_loras` of the
    /// LoRA settings come before the sizes.
    #[must_use]
    pub fn peft_cache_config(mut self, config: PeftCacheConfig) -> Self {
        self.peft_cache_config = config;
        self
    }

    /// Quantisation of base weights and KV cache: FP8 or none. It must agree with a checkpoint that
    /// is quantised; a 16-bit one is quantised while it is loaded. Adapters stay as they are.
    #[must_use]
    pub fn quant_config(mut self, config: QuantConfig) -> Self {
        self.quant_config = Some(config);
        self
    }

    /// Whether steps in which every sequence decodes are recorded once and then replayed, where the
    /// device can do that; true if not called.
    #[must_use]
    pub fn cuda_graphs(mut self, enabled: bool) -> Self {
        self.cuda_graphs = enabled;
        self
    }

    /// Whether every step waits until the tokens of the one before are known. Otherwise steps in which
    /// all sequences decode are handed to the device one ahead, with the same tokens; if not called,
    /// that is done where the device computes by itself.
    #[must_use]
    pub fn disable_overlap_scheduler(mut self, disabled: bool) -> Self {
        self.disable_overlap_scheduler = Some(disabled);
        self
    }

    /// Kernels of routed experts. LoRA inside the experts needs CUTLASS, which AUTO means.
    #[must_use]
    pub fn moe_backend(mut self, backend: MoeBackend) -> Self {
        self.moe_backend = backend;
        self
    }

    /// Memory for keys and values.
    #[must_use]
    pub fn kv_cache_config(mut self, config: KvCacheConfig) -> Self {
        self.kv_cache = config;
        self
    }

    /// When waiting sequences may start.
    #[must_use]
    pub fn scheduler_config(mut self, config: SchedulerConfig) -> Self {
        self.scheduler = config;
        self
    }

    /// Sequences that run at a time; 256 unless set.
    #[must_use]
    pub fn max_batch_size(mut self, sequences: usize) -> Self {
        self.batch.max_batch_size = sequences;
        self
    }

    /// Tokens of one step, 1024 unless set; longer prompts are computed in chunks.
    #[must_use]
    pub fn max_num_tokens(mut self, tokens: usize) -> Self {
        self.batch.max_num_tokens = tokens;
        self
    }

    /// Prompt and answer together, at most; the model's own limit unless set.
    #[must_use]
    pub fn max_seq_len(mut self, tokens: usize) -> Self {
        self.batch.max_seq_len = Some(tokens);
        self
    }

    /// Is told how loading goes.
    #[must_use]
    pub fn progress(mut self, progress: impl Fn(usize, usize) + Send + 'static) -> Self {
        self.progress = Box::new(progress);
        self
    }

    /// Loads the model on a thread of its own, on which `factory` makes the backend.
    ///
    /// # Errors
    /// [`LlmError`] if a setting is out of range, the model cannot be loaded, or the backend
    /// refuses.
    pub fn build<B: Backend>(
        self,
        factory: impl FnOnce() -> lora_core::Result<B> + Send + 'static,
    ) -> Result<Llm, LlmError> {
        let problems = self.rejections();
        if !problems.is_empty() {
            return Err(LlmError::LoraConfig(Rejections(problems)));
        }
        let tokenizer = self.tokenizer.as_deref();
        let Checkpoint { base, text, source } =
            Checkpoint::open(&self.model, tokenizer, self.load_format)?;
        let BaseModel { config, quantization, warnings } = base;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let quantization =
            quantize::settle(self.quant_config.as_ref(), self.kv_cache.dtype, quantization)?;
        sizes::check(&self.batch, &self.kv_cache, &config)?;
        let geometry = geometry(&config);
        let lora = self.lora_config.map(|lora| settle(lora, &geometry)).transpose()?;
        if let Some(lora) = &lora {
            check_experts(lora, &geometry, self.moe_backend, &quantization)?;
        }
        let texts = AdapterTexts::new(text, lora.as_ref());
        let base = match self.load_format {
            LoadFormat::Auto => base_weights(&self.model, geometry.clone()),
            LoadFormat::Dummy => dummy_weights(geometry.clone()),
        };
        let registry = Arc::new(AdapterRegistry::new(lora.clone(), geometry.clone(), base));
        let (commands, inbox) = unbounded();
        let readers = self.peft_cache_config.num_put_workers;
        let adapters = AdapterStore::start(readers, &registry, commands.clone())
            .map_err(|e| LlmError::Failed(format!("cannot start a loader thread: {e}")))?;
        let start = Start {
            dtype: self.dtype.unwrap_or(config.dtype),
            config,
            geometry,
            source,
            quantization,
            lora,
            cache: self.peft_cache_config,
            kv: self.kv_cache,
            scheduler: self.scheduler,
            batch: self.batch,
            cuda_graphs: self.cuda_graphs,
            disable_overlap_scheduler: self.disable_overlap_scheduler,
            progress: self.progress,
            adapters,
            inbox,
        };
        let (ready, started) = bounded(1);
        let run = move || match factory().map_err(LlmError::from).and_then(|be| start.start(be)) {
            Ok((core, info)) => {
                // Nobody waits any more if the builder was dropped; the loop then ends, too.
                let _ = ready.send(Ok(info));
                core.run();
            }
            Err(error) => drop(ready.send(Err(error))),
        };
        let thread = std::thread::Builder::new().name("loramux-engine".to_owned()).spawn(run);
        let thread = thread.map_err(|e| LlmError::Failed(e.to_string()))?;
        let info = Arc::new(started.recv().map_err(|_| LlmError::Stopped)??);
        let ids = AtomicU64::new(0);
        Ok(Llm { info, texts, registry, commands, ids, thread: Some(thread) })
    }

    fn rejections(&self) -> Vec<Rejection> {
        let mut problems = self.lora_config.as_ref().map_or_else(Vec::new, LoraConfig::validate);
        problems.extend(self.peft_cache_config.validate());
        problems.extend(self.quant_config.iter().flat_map(QuantConfig::validate));
        problems
    }
}

/// Fails if LoRA inside routed experts would not work with the rest of the settings.
fn check_experts(
    lora: &LoraConfig,
    geometry: &ModelGeometry,
    backend: MoeBackend,
    quantization: &Quantization,
) -> Result<(), Rejections> {
    Rejections(rules::check_construction(&rules::MoeSetup {
        targets: &lora.effective_targets(geometry),
        backend,
        weights: quantization.algorithm(),
        execution: rules::Execution::Eager,
    }))
    .into_result()
}

/// What the engine thread starts with.
struct Start {
    dtype: DType,
    config: ModelConfig,
    geometry: ModelGeometry,
    source: Box<dyn WeightSource + Send>,
    quantization: Quantization,
    lora: Option<LoraConfig>,
    cache: PeftCacheConfig,
    kv: KvCacheConfig,
    scheduler: SchedulerConfig,
    batch: BatchLimits,
    cuda_graphs: bool,
    disable_overlap_scheduler: Option<bool>,
    progress: Progress,
    adapters: AdapterStore,
    inbox: Receiver<Command>,
}

impl Start {
    /// Puts everything into the backend's memory.
    fn start<B: Backend>(self, be: B) -> Result<(Core<DeviceExecutor<B>>, EngineInfo), LlmError> {
        let Self { dtype, batch, geometry, .. } = self;
        let mut queue = be.queue()?;
        let layers = self.config.layers;
        let lora = self.lora.as_ref();
        let positions = batch.max_seq_len.unwrap_or(self.config.max_positions);
        let kv_dtype = if self.quantization.fp8_kv { DType::F8E4m3 } else { dtype };
        // What products round to e4m3 is not rounded before where that costs little: twice rounded,
        // some numbers come out as another code.
        let exact = self.quantization.weights.is_some() && be.caps().wide_activations;
        let activations = if exact { DType::F32 } else { dtype };
        let quant_algo = self.quantization.algorithm();
        let (slots, quantization) = (sizes::slots(lora), self.quantization);
        let plan = LoadPlan { dtype, positions, slots, quantization };
        let report = |done| (self.progress)(done, layers);
        let at_start = FreeMemory::of(&be)?;
        sizes::check_slots(lora, &geometry, at_start)?;
        let model = DenseModel::load(&be, &mut queue, self.config, self.source, &plan, &report)?;
        let limits = Limits {
            max_batch_size: batch.max_batch_size,
            max_num_tokens: batch.max_num_tokens.max(batch.max_batch_size),
            max_logit_rows: batch.max_batch_size.max(256),
            policy: self.scheduler.capacity_scheduler_policy,
            fairness_window: lora.map_or(0, |lora| lora.adapter_fairness_window),
        };
        let demand = Demand {
            batch: &batch,
            limits: &limits,
            kv: &self.kv,
            kv_dtype,
            activations,
            lora,
            cache: &self.cache,
            geometry: &geometry,
        };
        let buffers = demand.allocate(&be, &model, at_start)?;
        let info = EngineInfo {
            model: model.config.clone(),
            geometry,
            dtype,
            quant_algo,
            kv_dtype,
            backend: B::NAME,
            max_seq_len: buffers.max_seq_len,
            max_batch_size: limits.max_batch_size,
            kv_tokens: buffers.memory.kv_tokens,
            memory: buffers.memory,
        };
        let (host, device) = buffers.tiers;
        let tiers = AdapterTiers::new(host, device, self.cache.num_put_workers);
        let overlaps = !self.disable_overlap_scheduler.unwrap_or(!be.caps().asynchronous);
        let executor = DeviceExecutor::new(Parts {
            graphs: StepGraphs::new(&be, self.cuda_graphs),
            kv: buffers.kv_cache,
            state: buffers.state,
            sampler: buffers.sampler,
            be,
            queue,
            model,
        });
        let core = Core {
            executor,
            scheduler: Scheduler::new(limits, KvBlocks::new(buffers.kv), tiers),
            adapters: self.adapters,
            inbox: self.inbox,
            counts: Default::default(),
            overlaps,
        };
        Ok((core, info))
    }
}

/// Sends on the engine's channel.
pub(super) type Commands = Sender<Command>;
