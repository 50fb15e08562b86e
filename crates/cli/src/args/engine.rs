//! Arguments of the engine.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lora_core::{DType, QuantAlgo};
use loramux_engine::{EngineConfig, KvCacheDtype, LoadFormat};

use super::number::finite;

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

/// What computes, and how exactly.
#[derive(Args, Clone, PartialEq, Default, Debug)]
pub struct ComputeArgs {
    /// Dtype of the activations; weights stay as they are stored [default: the checkpoint's]
    #[arg(long, value_enum, help_heading = "Engine")]
    dtype: Option<DTypeArg>,
    /// What computes. auto: the GPU if there is one that loramux can use, else the CPU
    #[arg(long, value_enum, default_value_t = Device::Auto, help_heading = "Engine")]
    pub(crate) device: Device,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    pub(crate) threads: Option<NonZeroUsize>,
}

impl ComputeArgs {
    /// Overrides what the flags give.
    pub(crate) fn apply(&self, config: &mut EngineConfig) {
        if let Some(dtype) = self.dtype {
            config.dtype = dtype.into();
        }
    }
}

/// Settings of the engine: those of a file, and flags that override them.
#[derive(Args, Clone, PartialEq, Default, Debug)]
pub struct EngineArgs {
    /// YAML file with settings of the engine under TensorRT-LLM's names, such as lora_config and
    /// kv_cache_config; flags override it
    #[arg(
        long,
        visible_alias = "extra_llm_api_options",
        value_name = "FILE.yaml",
        help_heading = "Engine"
    )]
    pub(crate) config: Option<PathBuf>,
    /// Folder with tokenizer.json and chat template [default: the model's own]
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    /// Where weights come from; dummy: random numbers of the config's shape [default: auto]
    #[arg(long, value_enum, help_heading = "Engine")]
    load_format: Option<LoadFormatArg>,
    /// Sequences that run at a time [default: 256]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    max_batch_size: Option<NonZeroUsize>,
    /// Tokens of one step; longer prompts are computed in chunks [default: 1024]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    max_num_tokens: Option<NonZeroUsize>,
    /// Prompt and answer together, in tokens [default: the model's limit]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    max_seq_len: Option<NonZeroUsize>,
    /// Devices that hold the model together, each with a part of every layer; on the CPU, groups of
    /// threads [default: 1]
    #[arg(long, visible_alias = "tp_size", value_name = "N", help_heading = "Engine")]
    tensor_parallel_size: Option<NonZeroUsize>,
    /// Tokens that fit the KV cache [default: what the batch can need, up to 2 GiB of the host's memory or
    /// a share of the GPU's]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    kv_cache_tokens: Option<NonZeroUsize>,
    /// Share of the memory for the KV cache that model, activations and adapters leave free
    /// [default: 0.9 on a GPU]
    #[arg(long, value_name = "SHARE", value_parser = finite::<f64>, help_heading = "Engine")]
    free_gpu_memory_fraction: Option<f64>,
    /// Element type of keys and values. auto: the checkpoint's [default: auto]
    #[arg(long, value_enum, help_heading = "Engine")]
    kv_cache_dtype: Option<KvDtypeArg>,
    /// FP8 quantises a 16-bit model while it is loaded; NO_QUANT [default: as in the checkpoint]
    #[arg(long, value_name = "ALGO", value_parser = quant_algo, help_heading = "Engine")]
    quant_algo: Option<QuantAlgo>,
}

/// Puts the value of a flag, if it is given, in the place of a setting.
fn overlay<T>(setting: &mut T, flag: Option<impl Into<T>>) {
    if let Some(value) = flag {
        *setting = value.into();
    }
}

impl EngineArgs {
    /// Overrides what the flags give.
    pub(crate) fn apply(&self, config: &mut EngineConfig) {
        self.compute.apply(config);
        overlay(&mut config.tokenizer, self.tokenizer.clone().map(Some));
        overlay(&mut config.load_format, self.load_format);
        overlay(&mut config.max_batch_size, self.max_batch_size);
        overlay(&mut config.max_num_tokens, self.max_num_tokens);
        overlay(&mut config.max_seq_len, self.max_seq_len.map(|n| Some(n.get())));
        overlay(&mut config.tensor_parallel_size, self.tensor_parallel_size);
        let kv = &mut config.kv_cache_config;
        overlay(&mut kv.max_tokens, self.kv_cache_tokens.map(|n| Some(n.get())));
        overlay(&mut kv.free_gpu_memory_fraction, self.free_gpu_memory_fraction.map(Some));
        overlay(&mut kv.dtype, self.kv_cache_dtype);
        if self.quant_algo.is_some() {
            config.quant_config.get_or_insert_default().quant_algo = self.quant_algo;
        }
    }
}

#[derive(Clone, Copy, PartialEq, Debug, ValueEnum)]
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

#[derive(Clone, Copy, PartialEq, Debug, ValueEnum)]
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

#[derive(Clone, Copy, PartialEq, Debug, ValueEnum)]
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
