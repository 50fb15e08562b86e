//! Log-probabilities of raw logits.
#![allow(unsafe_code)]

use lora_core::ops::{LogprobArgs as Args, LogprobOut};
use lora_core::{Result, check};

use crate::args::{Address, DeviceMat, KernelArgs, MatArg, address, assert_layout};
use crate::device::Cuda;
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;

/// Threads of a block: a vocabulary is long.
const THREADS: usize = 1024;

#[repr(C)]
#[derive(Clone, Copy)]
struct LogprobArgs {
    logits: MatArg,
    top_ids: MatArg,
    top: MatArg,
    targets: Address,
    target: Address,
    rank: Address,
}

assert_layout!(LogprobArgs is 120 bytes: logits at 0, top_ids at 32, targets at 96, rank at 112);

// SAFETY: laid out as `LogprobArgs` of `logprobs.cu`.
unsafe impl KernelArgs for LogprobArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::Logprobs];
}

/// See [`lora_core::Backend::logprobs`].
pub fn logprobs(
    cuda: &Cuda,
    q: &mut CudaQueue,
    args: &Args<'_, Cuda>,
    out: &LogprobOut<'_, Cuda>,
) -> Result<()> {
    check::logprobs(args, out)?;
    cuda.check_ids(q, ["logprobs", "target"], args.targets, args.logits.layout.cols)?;
    let kernel_args = LogprobArgs {
        logits: args.logits.into(),
        top_ids: (&out.top_ids).into(),
        top: (&out.top).into(),
        targets: address(args.targets),
        target: DeviceMat::from(&out.target).data(),
        rank: DeviceMat::from(&out.rank).data(),
    };
    let launch = Launch::new([args.logits.layout.rows, 1, 1], THREADS);
    cuda.launch(q, Kernel::Logprobs, launch, kernel_args)
}
