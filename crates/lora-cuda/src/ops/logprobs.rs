//! Log-probabilities of raw logits.
#![allow(unsafe_code)]

use lora_core::ops::{LogprobArgs as Args, LogprobOut};
use lora_core::{Result, check};

use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::memory::queue::Launch;
use crate::{Cuda, CudaQueue};

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

// SAFETY: laid out as `LogprobArgs` of `logprobs.cu`.
unsafe impl KernelArgs for LogprobArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::Logprobs];
}

impl Cuda {
    /// See [`lora_core::Backend::logprobs`].
    pub(crate) fn log_softmax(
        &self,
        q: &mut CudaQueue,
        args: &Args<'_, Self>,
        out: &LogprobOut<'_, Self>,
    ) -> Result<()> {
        check::logprobs(args, out)?;
        self.check_ids(q, ["logprobs", "target"], args.targets, args.logits.layout.cols)?;
        let kernel = LogprobArgs {
            logits: args.logits.into(),
            top_ids: (&out.top_ids).into(),
            top: (&out.top).into(),
            targets: MatArg::from(args.targets).data(),
            target: MatArg::from(&out.target).data(),
            rank: MatArg::from(&out.rank).data(),
        };
        q.launch(
            &self.modules,
            Kernel::Logprobs,
            Launch::new([args.logits.layout.rows, 1, 1], THREADS),
            kernel,
        )
    }
}
