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

/// Loads the model, starts an engine on the device that the flags choose, and reports how its memory is divided.
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
    let world = config.tensor_parallel_size;
    let bar = progress::loading_bar(streams.live);
    let layers = bar.clone();
    let builder = Llm::builder(model).config(config).progress(move |done, all| {
        layers.set_length(all as u64);
        layers.set_position(done as u64);
    });
    let chosen = choose_device(compute.device);
    streams.note(format_args!("device: {}", chosen.note.replace('\n', " ")));
    let llm = if chosen.is_gpu {
        check_gpus(world)?;
        builder.build(|| Cuda::new(FIRST_GPU).map_err(Into::into))
    } else {
        let threads = compute.threads.map(NonZeroUsize::get);
        check_threads(threads)?;
        let of_rank = threads_of_rank(threads, world);
        builder.build_ranks(move |_| CpuRef::with_threads(of_rank))
    };
    bar.finish_and_clear();
    let llm = llm.map_err(|error| {
        // No adapter is read before the first request, except the one in the setting `lora_dir`.
        let setting = matches!(error, LlmError::Adapter(_));
        let failure = Failure::from(anyhow::Error::new(error).context("cannot start the engine"));
        let exit = if setting { Exit::Usage } else { failure.exit };
        Failure { exit, error: flags::with_flags(failure.error) }
    })?;
    let of_each = if world > 1 { format!("each of {world} ranks: ") } else { String::new() };
    streams.note(format_args!("memory: {of_each}{}", llm.info().memory));
    Ok(llm)
}

/// The GPU to run on.
const FIRST_GPU: usize = 0;

/// The device to run on.
struct Chosen {
    is_gpu: bool,
    /// The choice and its reason, for the user.
    note: String,
}

impl Chosen {
    fn cpu(note: String) -> Self {
        Self { is_gpu: false, note }
    }

    fn gpu(note: String) -> Self {
        Self { is_gpu: true, note }
    }
}

fn choose_device(device: Device) -> Chosen {
    match device {
        Device::Cpu => Chosen::cpu("the CPU (--device cpu)".to_owned()),
        Device::Cuda => Chosen::gpu("the GPU (--device cuda)".to_owned()),
        Device::Auto => match Cuda::probe(FIRST_GPU) {
            Ok(name) => Chosen::gpu(format!("{name}; --device cpu selects the CPU")),
            Err(reason) => Chosen::cpu(format!("the CPU, as no GPU can be used: {reason}")),
        },
    }
}

/// Refuses several GPUs, over which a model cannot be split yet.
fn check_gpus(world: usize) -> Result<(), Failure> {
    if world == 1 {
        return Ok(());
    }
    let error = anyhow::anyhow!(
        "tensor_parallel_size is {world}; allowed: 1 on a GPU; --device cpu splits the model over groups of threads"
    );
    Err(Failure { exit: Exit::Usage, error: flags::with_flags(error) })
}

/// Threads of each of `world` ranks, which share those asked for, or else the cores.
fn threads_of_rank(threads: Option<usize>, world: usize) -> Option<usize> {
    if world <= 1 {
        return threads;
    }
    let cores = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    Some((threads.unwrap_or_else(cores) / world).max(1))
}

/// Refuses more threads than this machine can use.
fn check_threads(threads: Option<usize>) -> Result<(), Failure> {
    let most = CpuRef::max_threads();
    let Some(found) = threads.filter(|threads| *threads > most) else { return Ok(()) };
    let error = anyhow::anyhow!(
        "--threads is {found}; allowed: 1 to {most}, as further threads only compete for the same cores; \
         leave it out for one thread a core"
    );
    Err(Failure { exit: Exit::Usage, error })
}
