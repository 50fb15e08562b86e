//! Starting the engine of a command.

use std::num::NonZeroUsize;
use std::path::Path;

use lora_cpu_ref::CpuRef;
use lora_cuda::Cuda;
use loramux_engine::{EngineConfig, Llm, LlmError};

use crate::args::{ComputeArgs, Device};
use crate::exit::{Exit, Failure};
use crate::flags;
use crate::progress;
use crate::streams::Streams;

/// Loads the model, starts an engine on the device that the flags name, and says what its memory is
/// used for.
///
/// # Errors
/// [`Exit::Usage`] if a setting is out of range for the model or the adapter in `lora_dir` cannot
/// be used, else [`Exit::Model`].
pub(crate) fn start(
    model: &Path,
    compute: &ComputeArgs,
    config: EngineConfig,
    streams: &mut Streams<'_>,
) -> Result<Llm, Failure> {
    let bar = progress::loading_bar(streams.live);
    let layers = bar.clone();
    let builder = Llm::builder(model).config(config).progress(move |done, all| {
        layers.set_length(all as u64);
        layers.set_position(done as u64);
    });
    let (on_gpu, device) = device(compute.device);
    streams.note(format_args!("device: {}", device.replace('\n', " ")));
    let llm = if on_gpu {
        builder.build_ranks(|rank| Cuda::new(rank).map_err(Into::into))
    } else {
        let threads = compute.threads.map(NonZeroUsize::get);
        check_threads(threads)?;
        builder.build_ranks(move |_| CpuRef::with_threads(threads))
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

/// Number of the GPU that is looked at to choose a device, that of the first rank.
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
