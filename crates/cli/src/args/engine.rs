//! Arguments of the engine.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lora_core::{DType, QuantAlgo};
use loramux_engine::{KvCacheDtype, LoadFormat};

use super::number::finite;

/// How an engine is set up; `None` leaves a choice to the engine.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct EngineSettings {
    /// Folder with another tokenizer.
    pub tokenizer: Option<PathBuf>,
    /// Dtype of the activations.
    pub dtype: Option<DType>,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// What computes.
    pub device: Device,
    /// CPU threads.
    pub threads: Option<usize>,
    /// Sequences that run at a time.
    pub max_batch_size: Option<usize>,
    /// Tokens of one step.
    pub max_num_tokens: Option<usize>,
    /// Prompt and answer together, at most.
    pub max_seq_len: Option<usize>,
    /// Tokens that fit the KV cache.
    pub kv_cache_tokens: Option<usize>,
    /// Share of the free memory for the KV cache.
    pub free_gpu_memory_fraction: Option<f64>,
    /// Element type of keys and values.
    pub kv_cache_dtype: KvCacheDtype,
    /// Algorithm of the base weights.
    pub quant_algo: Option<QuantAlgo>,
}

/// What computes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, ValueEnum)]
pub enum Device {
    /// The GPU where there is one that can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The first GPU.
    Cuda,
}

/// How the model computes.
#[derive(Args)]
pub(super) struct ComputeArgs {
    /// Dtype of the activations; weights stay as they are stored. auto: the checkpoint's
    #[arg(long, value_enum, default_value_t = DTypeArg::Auto, help_heading = "Engine")]
    dtype: DTypeArg,
    /// What computes. auto: the GPU if there is one that loramux can use, else the CPU
    #[arg(long, value_enum, default_value_t = Device::Auto, help_heading = "Engine")]
    device: Device,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    threads: Option<NonZeroUsize>,
}

impl ComputeArgs {
    /// Settings with nothing else chosen.
    pub fn settings(&self) -> EngineSettings {
        EngineSettings {
            dtype: self.dtype.into(),
            device: self.device,
            threads: self.threads.map(NonZeroUsize::get),
            ..EngineSettings::default()
        }
    }
}

/// The model and the sizes of the engine.
#[derive(Args)]
pub(super) struct EngineArgs {
    /// The base model: a folder with config.json and *.safetensors, or a .gguf file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: PathBuf,
    /// Folder with tokenizer.json and chat template [default: the model's own]
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Where weights come from; dummy: random numbers of the config's shape
    #[arg(long, value_enum, default_value_t = LoadFormatArg::Auto, help_heading = "Engine")]
    load_format: LoadFormatArg,
    /// Sequences that run at a time [default: 256]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    max_batch_size: Option<NonZeroUsize>,
    /// Tokens of one step; longer prompts are computed in chunks [default: 1024]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    max_num_tokens: Option<NonZeroUsize>,
    /// Prompt and answer together, in tokens [default: the model's limit]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    max_seq_len: Option<NonZeroUsize>,
    /// Tokens that fit the KV cache [default: what the batch can need, up to 2 GiB of the host's memory or
    /// a share of the GPU's]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    kv_cache_tokens: Option<NonZeroUsize>,
    /// Share of the memory for the KV cache that model, activations and adapters leave free
    /// [default: 0.9 on a GPU]
    #[arg(long, value_name = "SHARE", value_parser = finite::<f64>, help_heading = "Engine")]
    free_gpu_memory_fraction: Option<f64>,
    /// Element type of keys and values. auto: the checkpoint's
    #[arg(long, value_enum, default_value_t = KvDtypeArg::Auto, help_heading = "Engine")]
    kv_cache_dtype: KvDtypeArg,
    /// FP8 quantises a 16-bit model while it is loaded; NO_QUANT [default: as in the checkpoint]
    #[arg(long, value_name = "ALGO", value_parser = quant_algo, help_heading = "Engine")]
    quant_algo: Option<QuantAlgo>,
}

impl EngineArgs {
    /// The model, and the settings for an engine over it.
    pub fn split(self) -> (PathBuf, EngineSettings) {
        let settings = EngineSettings {
            tokenizer: self.tokenizer,
            load_format: self.load_format.into(),
            max_batch_size: self.max_batch_size.map(NonZeroUsize::get),
            max_num_tokens: self.max_num_tokens.map(NonZeroUsize::get),
            max_seq_len: self.max_seq_len.map(NonZeroUsize::get),
            kv_cache_tokens: self.kv_cache_tokens.map(NonZeroUsize::get),
            free_gpu_memory_fraction: self.free_gpu_memory_fraction,
            kv_cache_dtype: self.kv_cache_dtype.into(),
            quant_algo: self.quant_algo,
            ..self.compute.settings()
        };
        (self.model, settings)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum DTypeArg {
    Auto,
    Float32,
    Bfloat16,
    Float16,
}

impl From<DTypeArg> for Option<DType> {
    fn from(arg: DTypeArg) -> Self {
        match arg {
            DTypeArg::Auto => None,
            DTypeArg::Float32 => Some(DType::F32),
            DTypeArg::Bfloat16 => Some(DType::Bf16),
            DTypeArg::Float16 => Some(DType::F16),
        }
    }
}

/// Reads the name of an algorithm.
fn quant_algo(word: &str) -> Result<QuantAlgo, String> {
    QuantAlgo::from_name(&word.to_uppercase())
        .ok_or_else(|| format!("there is no algorithm {word}; give FP8 or NO_QUANT"))
}

#[derive(Clone, Copy, ValueEnum)]
enum KvDtypeArg {
    Auto,
    Fp8,
}

impl From<KvDtypeArg> for KvCacheDtype {
    fn from(arg: KvDtypeArg) -> Self {
        match arg {
            KvDtypeArg::Auto => Self::Auto,
            KvDtypeArg::Fp8 => Self::Fp8,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum LoadFormatArg {
    Auto,
    Dummy,
}

impl From<LoadFormatArg> for LoadFormat {
    fn from(arg: LoadFormatArg) -> Self {
        match arg {
            LoadFormatArg::Auto => Self::Auto,
            LoadFormatArg::Dummy => Self::Dummy,
        }
    }
}
