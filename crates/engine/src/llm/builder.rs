//! Starting an engine.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crossbeam_channel::{Sender, bounded, unbounded};
use lora_core::{
    Backend, DType, LoraConfig, ModelGeometry, PeftCacheConfig, Rejection, Rejections, TargetModule,
};

use super::lora_settings::{settle, warn_of_idle_settings};
use super::text_model::TextModel;
use super::{EngineInfo, Llm, LlmError};
use crate::adapters::{AdapterRegistry, SlotTable};
use crate::core::{Command, Core, Sampler};
use crate::kv::BlockPool;
use crate::model::{
    DenseModel, DummySource, FolderSource, Gguf, KvCache, LoadPlan, ModelConfig, ModelError,
    RunState, WeightSource, block_bytes,
};
use crate::scheduler::{Limits, Scheduler};

/// Where weights come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LoadFormat {
    /// The checkpoint.
    #[default]
    Auto,
    /// Random numbers of the config's shape, for benchmarks.
    Dummy,
}

/// Memory for keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvCacheConfig {
    /// Tokens of one KV block.
    pub tokens_per_block: usize,
    /// Tokens that fit the cache. `None`: as many as 2 GiB hold, but no more than
    /// `max_batch_size` of the longest sequences need.
    pub max_tokens: Option<usize>,
}

impl Default for KvCacheConfig {
    fn default() -> Self {
        Self { tokens_per_block: 32, max_tokens: None }
    }
}

/// Bytes of keys and values where no number of tokens is given.
const DEFAULT_KV_BYTES: usize = 2 << 30;

/// Slots for adapters where `max_loras` is not set, as many as the original gives its CUDA graphs.
const DEFAULT_SLOTS: usize = 8;

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
    kv_cache: KvCacheConfig,
    max_batch_size: usize,
    max_num_tokens: usize,
    max_seq_len: Option<usize>,
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
            kv_cache: KvCacheConfig::default(),
            max_batch_size: 256,
            max_num_tokens: 1024,
            max_seq_len: None,
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

    /// Sizes of the adapter caches. Checked, but not in force yet: adapters stay in host memory, and
    /// `max_loras` of the LoRA settings alone decides how many are resident.
    #[must_use]
    pub fn peft_cache_config(mut self, config: PeftCacheConfig) -> Self {
        self.peft_cache_config = config;
        self
    }

    /// Memory for keys and values.
    #[must_use]
    pub fn kv_cache_config(mut self, config: KvCacheConfig) -> Self {
        self.kv_cache = config;
        self
    }

    /// Sequences that run at a time; 256 unless set.
    #[must_use]
    pub fn max_batch_size(mut self, sequences: usize) -> Self {
        self.max_batch_size = sequences;
        self
    }

    /// Tokens of one step, 1024 unless set; longer prompts are computed in chunks.
    #[must_use]
    pub fn max_num_tokens(mut self, tokens: usize) -> Self {
        self.max_num_tokens = tokens;
        self
    }

    /// Prompt and answer together, at most; the model's own limit unless set.
    #[must_use]
    pub fn max_seq_len(mut self, tokens: usize) -> Self {
        self.max_seq_len = Some(tokens);
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
        let checkpoint = self.open()?;
        let sizes = self.sizes(&checkpoint.config)?;
        let text = checkpoint.text.clone();
        let info = Arc::new(self.info(&checkpoint.config, &sizes, B::NAME));
        warn_of_idle_settings(self.lora_config.as_ref(), &self.peft_cache_config);
        let lora = self.lora_config.map(|lora| settle(lora, &info.geometry)).transpose()?;
        let registry = AdapterRegistry::new(lora, info.geometry.clone());
        let (commands, inbox) = unbounded();
        let (ready, started) = bounded(1);
        let progress = self.progress;
        let thread =
            std::thread::Builder::new().name("polylora-engine".to_owned()).spawn(move || {
                match factory().map_err(ModelError::from).and_then(|be| {
                    start(be, checkpoint.config, checkpoint.source, sizes, &progress)
                }) {
                    Ok(core) => {
                        // Nobody waits any more if the builder was dropped; the loop then ends, too.
                        let _ = ready.send(Ok(()));
                        core.run(&inbox);
                    }
                    Err(error) => drop(ready.send(Err(error))),
                }
            });
        let thread = thread.map_err(|e| LlmError::Failed(e.to_string()))?;
        started.recv().map_err(|_| LlmError::Stopped)??;
        Ok(Llm { info, text, registry, commands, ids: AtomicU64::new(0), thread: Some(thread) })
    }

    fn rejections(&self) -> Vec<Rejection> {
        let mut problems = self.lora_config.as_ref().map_or_else(Vec::new, LoraConfig::validate);
        problems.extend(self.peft_cache_config.validate());
        problems
    }

    fn open(&self) -> Result<Checkpoint, LlmError> {
        let path = &self.model;
        let tokenizer = self.tokenizer.as_deref();
        if path.is_dir() {
            let source: Box<dyn WeightSource + Send> = match self.load_format {
                LoadFormat::Auto => Box::new(FolderSource::open(path)?),
                LoadFormat::Dummy => Box::new(DummySource),
            };
            let config = ModelConfig::from_dir(path)?;
            let dir = tokenizer.unwrap_or(path);
            let only_shape = self.load_format == LoadFormat::Dummy && tokenizer.is_none();
            let text = match only_shape && !dir.join("tokenizer.json").exists() {
                true => TextModel::none(dir),
                false => TextModel::from_dir(dir)?,
            };
            return Ok(Checkpoint { config, text, source });
        }
        if !is_gguf(path) {
            let what = if path.exists() { "not a folder or .gguf file" } else { "does not exist" };
            return Err(ModelError::NotAModel { path: path.clone(), what: what.to_owned() }.into());
        }
        if self.load_format == LoadFormat::Dummy {
            return Err(LlmError::Setting {
                setting: "load_format",
                found: "dummy".to_owned(),
                allowed: "auto for a .gguf file; dummy takes a folder with config.json".to_owned(),
            });
        }
        let gguf = Gguf::open(path)?;
        let text = match tokenizer {
            Some(dir) => TextModel::from_dir(dir)?,
            None => TextModel::from_gguf(path, &gguf)?,
        };
        Ok(Checkpoint { config: gguf.config().clone(), text, source: Box::new(gguf) })
    }

    fn sizes(&self, config: &ModelConfig) -> Result<Sizes, LlmError> {
        for (setting, value, limit) in [
            ("max_batch_size", Some(self.max_batch_size), 1 << 16),
            ("max_num_tokens", Some(self.max_num_tokens), 1 << 20),
            ("max_seq_len", self.max_seq_len, config.max_positions),
            ("tokens_per_block", Some(self.kv_cache.tokens_per_block), 1 << 16),
            // Rows of the cache are numbered in 32 bits.
            ("kv_cache_config.max_tokens", self.kv_cache.max_tokens, 1 << 30),
        ] {
            if let Some(value) = value.filter(|value| !(1..=limit).contains(value)) {
                let (found, allowed) = (value.to_string(), format!("1 to {limit}"));
                return Err(LlmError::Setting { setting, found, allowed });
            }
        }
        let dtype = self.dtype.unwrap_or(config.dtype);
        let tokens_per_block = self.kv_cache.tokens_per_block;
        let block_bytes = block_bytes(config, dtype, tokens_per_block);
        let longest = self.max_seq_len.unwrap_or(config.max_positions);
        let needed = self.max_batch_size.saturating_mul(longest.div_ceil(tokens_per_block));
        let blocks = match self.kv_cache.max_tokens {
            Some(tokens) => tokens.div_ceil(tokens_per_block),
            None => needed.min((DEFAULT_KV_BYTES / block_bytes).max(1)),
        };
        let held = blocks * tokens_per_block;
        if self.max_seq_len.is_some_and(|asked| asked > held) {
            let allowed = format!("up to {held}, the tokens that fit the KV cache");
            let found = longest.to_string();
            return Err(LlmError::Setting { setting: "max_seq_len", found, allowed });
        }
        Ok(Sizes {
            dtype,
            slots: match &self.lora_config {
                Some(lora) => lora.max_loras.unwrap_or(DEFAULT_SLOTS),
                None => 0,
            },
            blocks,
            tokens_per_block,
            max_seq_len: longest.min(held),
            limits: Limits {
                max_batch_size: self.max_batch_size,
                max_num_tokens: self.max_num_tokens.max(self.max_batch_size),
                max_logit_rows: self.max_batch_size.max(256),
            },
        })
    }

    fn info(&self, config: &ModelConfig, sizes: &Sizes, backend: &'static str) -> EngineInfo {
        EngineInfo {
            model: config.clone(),
            geometry: geometry(config),
            dtype: sizes.dtype,
            backend,
            max_seq_len: sizes.max_seq_len,
            max_batch_size: sizes.limits.max_batch_size,
            kv_tokens: sizes.blocks * sizes.tokens_per_block,
        }
    }
}

/// An opened model.
struct Checkpoint {
    config: ModelConfig,
    text: TextModel,
    source: Box<dyn WeightSource + Send>,
}

/// Sizes of an engine's memory, settled.
#[derive(Clone, Copy)]
struct Sizes {
    dtype: DType,
    slots: usize,
    blocks: usize,
    tokens_per_block: usize,
    max_seq_len: usize,
    limits: Limits,
}

fn is_gguf(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

/// The dimensions that adapters meet.
pub fn geometry(config: &ModelConfig) -> ModelGeometry {
    ModelGeometry {
        hidden: config.hidden,
        intermediate: config.intermediate,
        layers: config.layers,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        vocab: config.vocab,
        num_experts: 0,
        moe_intermediate: 0,
        tied_embeddings: config.tied_embeddings,
        hf_modules: ModelGeometry::DENSE_MODULES.map(str::to_owned).to_vec(),
        biased_modules: biased_modules(config),
    }
}

fn biased_modules(config: &ModelConfig) -> BTreeSet<TargetModule> {
    use TargetModule::{AttnDense, AttnK, AttnQ, AttnV, Mlp4hToH, MlpGate, MlpHTo4h};
    let groups = [
        (config.biases.qkv, &[AttnQ, AttnK, AttnV][..]),
        (config.biases.o, &[AttnDense]),
        (config.biases.mlp, &[MlpHTo4h, MlpGate, Mlp4hToH]),
    ];
    groups.into_iter().filter(|(has, _)| *has).flat_map(|(_, modules)| modules).copied().collect()
}

/// Puts everything into the backend's memory.
fn start<B: Backend>(
    be: B,
    config: ModelConfig,
    source: Box<dyn WeightSource + Send>,
    sizes: Sizes,
    progress: &Progress,
) -> Result<Core<B>, ModelError> {
    let Sizes { dtype, slots, blocks, tokens_per_block, max_seq_len, limits } = sizes;
    let mut queue = be.queue()?;
    let layers = config.layers;
    let plan = LoadPlan { dtype, positions: max_seq_len, slots };
    let report = |done| progress(done, layers);
    let model = DenseModel::load(&be, &mut queue, config, source, plan, &report)?;
    let config = &model.config;
    let (rows, logit_rows) = (limits.max_num_tokens, limits.max_logit_rows);
    Ok(Core {
        kv: KvCache::new(&be, config, dtype, blocks, tokens_per_block)?,
        state: RunState::new(&be, config, dtype, rows, logit_rows)?,
        sampler: Sampler::new(&be, logit_rows, config.vocab)?,
        scheduler: Scheduler::new(
            limits,
            BlockPool::new(blocks, tokens_per_block),
            SlotTable::new(slots),
        ),
        be,
        queue,
        model,
    })
}

/// Sends on the engine's channel.
pub(super) type Commands = Sender<Command>;
