//! Starting the engine of a command.

use std::path::Path;

use lora_core::{LoraConfig, QuantConfig};
use lora_cpu_ref::CpuRef;
use lora_cuda::Cuda;
use loramux_engine::{KvCacheConfig, Llm, LlmBuilder, LlmError};

use crate::args::{Device, EngineSettings};
use crate::exit::{Exit, Failure};
use crate::flags;
use crate::progress;
use crate::streams::Streams;

/// Loads the model and starts an engine on the device that the settings name, with LoRA if `lora` is
/// given, and says what its memory is for.
///
/// # Errors
/// [`Exit::Usage`] if a setting is out of range for the model or the adapter in `lora_dir` cannot
/// be used, else [`Exit::Model`].
pub(crate) fn start(
    model: &Path,
    settings: &EngineSettings,
    lora: Option<LoraConfig>,
    streams: &mut Streams<'_>,
) -> Result<Llm, Failure> {
    let mut builder = configure(Llm::builder(model), settings);
    if let Some(lora) = lora {
        builder = builder.lora_config(lora);
    }
    let bar = progress::loading_bar(streams.live);
    let layers = bar.clone();
    builder = builder.progress(move |done, all| {
        layers.set_length(all as u64);
        layers.set_position(done as u64);
    });
    let (on_gpu, device) = device(settings.device);
    streams.note(format_args!("device: {}", device.replace('\n', " ")));
    let llm = match on_gpu {
        true => builder.build(|| Cuda::new(GPU).map_err(Into::into)),
        false => {
            let threads = settings.threads;
            check_threads(threads)?;
            builder.build(move || CpuRef::with_threads(threads))
        }
    };
    bar.finish_and_clear();
    let llm = llm.map_err(|error| {
        // Before any request, the only adapter that is read is the one in `lora_dir`, a setting.
        let setting = matches!(error, LlmError::Adapter(_));
        let failure = Failure::from(anyhow::Error::new(error).context("cannot start the engine"));
        let exit = if setting { Exit::Usage } else { failure.exit };
        Failure { exit, error: flags::with_flags(failure.error) }
    })?;
    streams.note(format_args!("memory: {}", llm.info().memory));
    Ok(llm)
}

/// Number of the GPU.
const GPU: usize = 0;

/// Whether the GPU is taken, and what to say of the choice.
fn device(device: Device) -> (bool, String) {
    match device {
        Device::Cpu => (false, "the CPU, as --device cpu asks".to_owned()),
        Device::Cuda => (true, "the GPU, as --device cuda asks".to_owned()),
        Device::Auto => match Cuda::probe(GPU) {
            Ok(name) => (true, format!("{name}; --device cpu takes the CPU")),
            Err(reason) => (false, format!("the CPU, as there is no GPU to use: {reason}")),
        },
    }
}

/// Fails above the number of threads that this machine has a use for.
fn check_threads(threads: Option<usize>) -> Result<(), Failure> {
    let most = CpuRef::max_threads();
    match threads.filter(|threads| *threads > most) {
        None => Ok(()),
        Some(found) => {
            let error = anyhow::anyhow!(
                "--threads is {found}; allowed: 1 to {most}, as more than a few for each core only take \
                 turns; leave it out for one thread a core"
            );
            Err(Failure { exit: Exit::Usage, error })
        }
    }
}

fn configure(builder: LlmBuilder, settings: &EngineSettings) -> LlmBuilder {
    let mut builder = builder.dtype(settings.dtype).load_format(settings.load_format);
    if let Some(dir) = &settings.tokenizer {
        builder = builder.tokenizer(dir);
    }
    if let Some(sequences) = settings.max_batch_size {
        builder = builder.max_batch_size(sequences);
    }
    if let Some(tokens) = settings.max_num_tokens {
        builder = builder.max_num_tokens(tokens);
    }
    if let Some(tokens) = settings.max_seq_len {
        builder = builder.max_seq_len(tokens);
    }
    if settings.quant_algo.is_some() {
        let quant = QuantConfig { quant_algo: settings.quant_algo, ..QuantConfig::default() };
        builder = builder.quant_config(quant);
    }
    builder.kv_cache_config(KvCacheConfig {
        dtype: settings.kv_cache_dtype,
        max_tokens: settings.kv_cache_tokens,
        free_gpu_memory_fraction: settings.free_gpu_memory_fraction,
        ..KvCacheConfig::default()
    })
}
