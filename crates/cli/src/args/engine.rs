//! Engine flags, which override the settings of a `--config` file.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lora_core::{DType, QuantAlgo};
use loramux_engine::{EngineConfig, KvCacheDtype, LoadFormat};

use super::number::finite;

/// The device to run on.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, ValueEnum)]
pub enum Device {
    /// The first GPU if it can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The first GPU.
    Cuda,
}

/// Flags of every command that runs a model: device, dtype, threads.
#[derive(Args, Clone, PartialEq, Default, Debug)]
pub struct ComputeArgs {
    /// Dtype of the activations; weights keep their stored dtype [default: the checkpoint's]
    #[arg(long, value_enum, help_heading = "Engine")]
    dtype: Option<DTypeArg>,
    /// Device to run on. auto: the GPU if loramux can use it, else the CPU
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

/// Engine settings: a file, and flags that override it.
#[derive(Args, Clone, PartialEq, Default, Debug)]
pub struct EngineArgs {
    /// YAML file of engine settings under TensorRT-LLM's names, such as lora_config and kv_cache_config;
    /// flags override it
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
    /// Source of the weights. auto: the checkpoint; dummy: random weights of the config's shape
    /// [default: auto]
    #[arg(long, value_enum, help_heading = "Engine")]
    load_format: Option<LoadFormatArg>,
    /// Maximum sequences that run at once [default: 256]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    max_batch_size: Option<NonZeroUsize>,
    /// Maximum tokens of one step; longer prompts are prefilled in chunks [default: 1024]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    max_num_tokens: Option<NonZeroUsize>,
    /// Maximum tokens of prompt and answer together [default: the model's limit]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    max_seq_len: Option<NonZeroUsize>,
    /// Tensor-parallel ranks, each with a shard of every layer; a rank is a group of CPU threads;
    /// several GPUs are not supported yet [default: 1]
    #[arg(long, visible_alias = "tp_size", value_name = "N", help_heading = "Engine")]
    tensor_parallel_size: Option<NonZeroUsize>,
    /// Capacity of the KV cache in tokens [default: the most that a batch can need, up to 2 GiB on the CPU
    /// or the fraction of --free-gpu-memory-fraction on a GPU]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    kv_cache_tokens: Option<NonZeroUsize>,
    /// Fraction of the memory left by weights, activations and adapters that the KV cache takes
    /// [default: 0.9 on a GPU]
    #[arg(long, value_name = "FRACTION", value_parser = finite::<f64>, help_heading = "Engine")]
    free_gpu_memory_fraction: Option<f64>,
    /// Dtype of the KV cache. auto: as in the checkpoint [default: auto]
    #[arg(long, value_enum, help_heading = "Engine")]
    kv_cache_dtype: Option<KvDtypeArg>,
    /// FP8: quantise a 16-bit model at load; NO_QUANT: do not [default: as in the checkpoint]
    #[arg(long, value_name = "ALGO", value_parser = quant_algo, help_heading = "Engine")]
    quant_algo: Option<QuantAlgo>,
}

/// Overwrites a setting with the value of its flag, if the flag is given.
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
        if let (Some(KvDtypeArg::Auto), Some(quant)) =
            (self.kv_cache_dtype, &mut config.quant_config)
        {
            quant.kv_cache_quant_algo = None;
        }
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

/// Parses the name of a quantisation algorithm.
fn quant_algo(word: &str) -> Result<QuantAlgo, String> {
    QuantAlgo::from_name(&word.to_uppercase())
        .ok_or_else(|| format!("unknown algorithm {word}; give FP8 or NO_QUANT"))
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
