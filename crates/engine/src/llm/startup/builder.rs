//! [`LlmBuilder`]: from settings to a running engine.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crossbeam_channel::unbounded;
use lora_core::{
    Backend, DType, LoraConfig, ModelGeometry, PeftCacheConfig, QuantConfig, Rejections,
};

use loramux_moe::{MoeBackendName, rules};

use super::base_model::BaseModel;
use super::checkpoint::Checkpoint;
use super::config::EngineConfig;
use super::geometry::geometry;
use super::launch::{self, EngineStart, Factory, Progress};
use super::lora::resolve;
use super::quantize;
use super::rank::RankConfig;
use super::settings::{CudaGraphConfig, KvCacheConfig, LoadFormat, SchedulerConfig};
use super::sizes;
use crate::adapters::AdapterRegistry;
use crate::core::AdapterStore;
use crate::llm::adapters::Adapters;
use crate::llm::commands::{Commands, EngineThread};
use crate::llm::request::Intake;
use crate::llm::text::AdapterTexts;
use crate::llm::{Llm, LlmError};
use crate::model::{Quantization, base_weights, dummy_weights};

/// Maximum number of devices of a tensor-parallel group.
const MAX_RANKS: usize = 64;

/// Settings of an engine to start; made by [`Llm::builder`].
pub struct LlmBuilder {
    model: PathBuf,
    config: EngineConfig,
    progress: Progress,
}

impl LlmBuilder {
    pub(in crate::llm) fn new(model: PathBuf) -> Self {
        Self { model, config: EngineConfig::default(), progress: Box::new(|_, _| ()) }
    }

    /// Sets all settings at once, replacing earlier ones.
    #[must_use]
    pub fn config(mut self, config: EngineConfig) -> Self {
        self.config = config;
        self
    }

    /// [`EngineConfig::tokenizer`].
    #[must_use]
    pub fn tokenizer(mut self, dir: impl Into<PathBuf>) -> Self {
        self.config.tokenizer = Some(dir.into());
        self
    }

    /// [`EngineConfig::dtype`].
    #[must_use]
    pub fn dtype(mut self, dtype: Option<DType>) -> Self {
        self.config.dtype = dtype;
        self
    }

    /// [`EngineConfig::load_format`].
    #[must_use]
    pub fn load_format(mut self, format: LoadFormat) -> Self {
        self.config.load_format = format;
        self
    }

    /// [`EngineConfig::lora_config`].
    #[must_use]
    pub fn lora_config(mut self, config: LoraConfig) -> Self {
        self.config.lora_config = Some(config);
        self
    }

    /// [`EngineConfig::peft_cache_config`].
    #[must_use]
    pub fn peft_cache_config(mut self, config: PeftCacheConfig) -> Self {
        self.config.peft_cache_config = config;
        self
    }

    /// [`EngineConfig::quant_config`].
    #[must_use]
    pub fn quant_config(mut self, config: QuantConfig) -> Self {
        self.config.quant_config = Some(config);
        self
    }

    /// [`EngineConfig::cuda_graph_config`]: the defaults, or no CUDA graphs.
    #[must_use]
    pub fn cuda_graphs(mut self, enabled: bool) -> Self {
        self.config.cuda_graph_config = enabled.then(CudaGraphConfig::default);
        self
    }

    /// [`EngineConfig::disable_overlap_scheduler`].
    #[must_use]
    pub fn disable_overlap_scheduler(mut self, disabled: bool) -> Self {
        self.config.disable_overlap_scheduler = Some(disabled);
        self
    }

    /// [`EngineConfig::moe_backend`].
    #[must_use]
    pub fn moe_backend(mut self, backend: MoeBackendName) -> Self {
        self.config.moe_backend = Some(backend);
        self
    }

    /// [`EngineConfig::kv_cache_config`].
    #[must_use]
    pub fn kv_cache_config(mut self, config: KvCacheConfig) -> Self {
        self.config.kv_cache_config = config;
        self
    }

    /// [`EngineConfig::scheduler_config`].
    #[must_use]
    pub fn scheduler_config(mut self, config: SchedulerConfig) -> Self {
        self.config.scheduler_config = config;
        self
    }

    /// [`EngineConfig::max_batch_size`].
    #[must_use]
    pub fn max_batch_size(mut self, sequences: usize) -> Self {
        self.config.max_batch_size = sequences;
        self
    }

    /// [`EngineConfig::max_num_tokens`].
    #[must_use]
    pub fn max_num_tokens(mut self, tokens: usize) -> Self {
        self.config.max_num_tokens = tokens;
        self
    }

    /// [`EngineConfig::max_seq_len`].
    #[must_use]
    pub fn max_seq_len(mut self, tokens: usize) -> Self {
        self.config.max_seq_len = Some(tokens);
        self
    }

    /// [`EngineConfig::tensor_parallel_size`]. More than one device is started by
    /// [`LlmBuilder::build_ranks`].
    #[must_use]
    pub fn tensor_parallel_size(mut self, devices: usize) -> Self {
        self.config.tensor_parallel_size = devices;
        self
    }

    /// Sets the callback for progress of loading.
    #[must_use]
    pub fn progress(mut self, progress: impl Fn(usize, usize) + Send + 'static) -> Self {
        self.progress = Box::new(progress);
        self
    }

    /// Starts the engine on a thread of its own, on which `factory` makes the backend. Returns when the model
    /// is loaded.
    ///
    /// # Errors
    /// [`LlmError`] if a setting is out of range, the model cannot be loaded, or the backend fails.
    pub fn build<B: Backend>(
        self,
        factory: impl FnOnce() -> lora_core::Result<B> + Send + 'static,
    ) -> Result<Llm, LlmError> {
        let found = self.config.tensor_parallel_size;
        if found != 1 {
            return Err(LlmError::setting(
                "tensor_parallel_size",
                found,
                "1; build_ranks takes more",
            ));
        }
        self.launch(vec![Box::new(factory)])
    }

    /// As [`LlmBuilder::build`], for a tensor-parallel group of [`LlmBuilder::tensor_parallel_size`] devices:
    /// `factory` makes the backend of each rank, from 0, on that rank's thread.
    ///
    /// # Errors
    /// As [`LlmBuilder::build`]; [`LlmError::Model`] if the model cannot be split over so many devices.
    pub fn build_ranks<B: Backend>(
        self,
        factory: impl Fn(usize) -> lora_core::Result<B> + Send + Sync + 'static,
    ) -> Result<Llm, LlmError> {
        let world = self.config.tensor_parallel_size;
        if !(1..=MAX_RANKS).contains(&world) {
            return Err(LlmError::setting(
                "tensor_parallel_size",
                world,
                format!("1 to {MAX_RANKS}"),
            ));
        }
        let factory = Arc::new(factory);
        let of_rank = |rank| {
            let factory = factory.clone();
            Box::new(move || factory(rank)) as Factory<B>
        };
        let factories = (0..world).map(of_rank).collect();
        self.launch(factories)
    }

    /// Starts the engine, with one thread for each device.
    fn launch<B: Backend>(self, factories: Vec<Factory<B>>) -> Result<Llm, LlmError> {
        let Self { model, config: mut settings, progress } = self;
        Rejections(settings.validate()).into_result()?;
        let moe_backend = settings.resolved_moe_backend()?;
        check_tokenizer(settings.tokenizer.as_deref())?;
        let checkpoint =
            Checkpoint::open(&model, settings.tokenizer.as_deref(), settings.load_format)?;
        let BaseModel { config, quantization, warnings } = checkpoint.base;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let asked = settings.quant_config.as_ref();
        let quantization = quantize::resolve(asked, settings.kv_cache_config.dtype, quantization)?;
        quantize::warn_of_unused(asked, &quantization, config.layers);
        sizes::check(&settings.batch(), &settings.kv_cache_config, &config)?;
        sizes::check_graphs(settings.cuda_graph_config.as_ref())?;
        launch::check_ranks(factories.len(), &config)?;
        let geometry = geometry(&config);
        let lora = settings.lora_config.take();
        settings.lora_config = lora.map(|lora| resolve(lora, &geometry)).transpose()?;
        if let Some(lora) = &settings.lora_config {
            check_experts(lora, &geometry, moe_backend, &quantization)?;
        }
        let texts = AdapterTexts::new(checkpoint.text, settings.lora_config.as_ref());
        let base = match settings.load_format {
            LoadFormat::Auto => base_weights(&model, geometry.clone()),
            LoadFormat::Dummy => dummy_weights(geometry.clone()),
        };
        let lora = settings.lora_config.clone();
        let registry = Arc::new(AdapterRegistry::new(lora, geometry.clone(), base));
        let (commands, inbox) = unbounded();
        let readers = settings.peft_cache_config.num_put_workers;
        let store = AdapterStore::start(readers, &registry, commands.clone())
            .map_err(|cause| LlmError::Thread { what: "a loader thread".to_owned(), cause })?;
        let rank_config = RankConfig { model, settings, config, geometry, quantization };
        let start = EngineStart {
            rank_config,
            source: checkpoint.source,
            progress,
            adapters: store,
            inbox,
        };
        let (info, thread) = start.spawn(factories)?;
        let commands = Commands::from(commands);
        let adapters = Adapters::new(registry, texts, commands.clone());
        let thread = EngineThread::new(commands.clone(), thread);
        Ok(Llm::new(Intake::new(info, adapters, commands), thread))
    }
}

/// Fails unless the tokenizer that the settings name exists.
fn check_tokenizer(dir: Option<&Path>) -> Result<(), LlmError> {
    match dir.filter(|dir| !dir.join("tokenizer.json").is_file()) {
        Some(dir) => {
            Err(LlmError::setting("tokenizer", dir.display(), "a folder with tokenizer.json"))
        }
        None => Ok(()),
    }
}

/// Fails if LoRA in routed experts is incompatible with the other settings.
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
