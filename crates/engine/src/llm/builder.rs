//! Starting an engine.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crossbeam_channel::{Sender, unbounded};
use lora_core::{
    Backend, DType, LoraConfig, ModelGeometry, PeftCacheConfig, QuantConfig, Rejection, Rejections,
};

use loramux_moe::{MoeBackendName, rules};

use super::adapter_texts::AdapterTexts;
use super::base_model::BaseModel;
use super::checkpoint::Checkpoint;
use super::geometry::geometry;
use super::launch::{self, Factory, Start};
use super::lora_settings::resolve;
use super::quantize;
use super::rank::Startup;
use super::settings::{BatchLimits, KvCacheConfig, LoadFormat, SchedulerConfig};
use super::sizes;
use super::{Llm, LlmError};
use crate::adapters::AdapterRegistry;
use crate::core::{AdapterStore, Command};
use crate::model::{Quantization, base_weights, dummy_weights};

/// Called with the layers read so far and their number.
pub type Progress = Box<dyn Fn(usize, usize) + Send>;

/// Settings of an engine, under TensorRT-LLM's names; made by [`Llm::builder`].
pub struct LlmBuilder {
    model: PathBuf,
    tokenizer: Option<PathBuf>,
    dtype: Option<DType>,
    load_format: LoadFormat,
    lora_config: Option<LoraConfig>,
    peft_cache_config: PeftCacheConfig,
    quant_config: Option<QuantConfig>,
    moe_backend: MoeBackendName,
    cuda_graphs: bool,
    disable_overlap_scheduler: Option<bool>,
    kv_cache: KvCacheConfig,
    scheduler: SchedulerConfig,
    batch: BatchLimits,
    tensor_parallel_size: usize,
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
            moe_backend: MoeBackendName::Auto,
            cuda_graphs: true,
            disable_overlap_scheduler: None,
            kv_cache: KvCacheConfig::default(),
            scheduler: SchedulerConfig::default(),
            batch: BatchLimits::default(),
            tensor_parallel_size: 1,
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
    pub fn moe_backend(mut self, backend: MoeBackendName) -> Self {
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

    /// Devices that hold the model together, each with a part of every layer; 1 unless set. More than one are
    /// started by [`LlmBuilder::build_ranks`].
    #[must_use]
    pub fn tensor_parallel_size(mut self, devices: usize) -> Self {
        self.tensor_parallel_size = devices;
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
        match self.tensor_parallel_size {
            1 => self.launch(vec![Box::new(factory)]),
            found => {
                Err(LlmError::setting("tensor_parallel_size", found, "1; build_ranks takes more"))
            }
        }
    }

    /// As [`LlmBuilder::build`], with as many devices as [`LlmBuilder::tensor_parallel_size`] says: `factory` makes
    /// that of each rank, from 0, on a thread of its own.
    ///
    /// # Errors
    /// As [`LlmBuilder::build`]; [`LlmError::Model`] if the model cannot be divided by so many.
    pub fn build_ranks<B: Backend>(
        self,
        factory: impl Fn(usize) -> lora_core::Result<B> + Send + Sync + 'static,
    ) -> Result<Llm, LlmError> {
        let factory = Arc::new(factory);
        let of_rank = |rank| {
            let factory = factory.clone();
            Box::new(move || factory(rank)) as Factory<B>
        };
        let factories = (0..self.tensor_parallel_size).map(of_rank).collect();
        self.launch(factories)
    }

    /// Loads the model on a thread for each device.
    fn launch<B: Backend>(self, factories: Vec<Factory<B>>) -> Result<Llm, LlmError> {
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
            quantize::resolve(self.quant_config.as_ref(), self.kv_cache.dtype, quantization)?;
        sizes::check(&self.batch, &self.kv_cache, &config)?;
        launch::check_ranks(factories.len(), &config)?;
        let geometry = geometry(&config);
        let lora = self.lora_config.map(|lora| resolve(lora, &geometry)).transpose()?;
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
        let limits = sizes::limits(&self.batch, self.scheduler, lora.as_ref());
        let startup = Startup {
            model: self.model,
            load_format: self.load_format,
            dtype: self.dtype.unwrap_or(config.dtype),
            config,
            geometry,
            quantization,
            lora,
            cache: self.peft_cache_config,
            kv: self.kv_cache,
            batch: self.batch,
            limits,
            cuda_graphs: self.cuda_graphs,
        };
        let start = Start {
            startup,
            source,
            disable_overlap_scheduler: self.disable_overlap_scheduler,
            progress: self.progress,
            adapters,
            inbox,
        };
        let (info, thread) = start.spawn(factories)?;
        let info = Arc::new(info);
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
    backend: MoeBackendName,
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

/// Sends on the engine's channel.
pub(super) type Commands = Sender<Command>;
