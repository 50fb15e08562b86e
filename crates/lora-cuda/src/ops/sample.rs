//! Drawing tokens.
#![allow(unsafe_code)]

use lora_core::ops::{SampleArgs as Args, SampleRow};
use lora_core::{DType, Mat, Result, check};

use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::queue::Launch;
use crate::{Cuda, CudaQueue, ViewMut};

/// Threads of a block: a vocabulary is long.
const THREADS: usize = 1024;

#[repr(C)]
#[derive(Clone, Copy)]
struct SampleArgs {
    logits: MatArg,
    params: MatArg,
    history: MatArg,
    masks: MatArg,
    scratch: MatArg,
    banned: Address,
    out: Address,
}

// SAFETY: laid out as `SampleArgs` of `sample.cu`.
unsafe impl KernelArgs for SampleArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::Sample];
}

impl Cuda {
    /// See [`lora_core::Backend::sample`].
    pub(crate) fn draw(
        &self,
        q: &mut CudaQueue,
        args: &Args<'_, Self>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        check::sample(args, out.geo)?;
        self.check_rows(q, args)?;
        let (rows, vocab) = (args.logits.geo.rows, args.logits.geo.cols);
        let scratch = q.scratch(rows * vocab * size_of::<f32>())?;
        let kernel = SampleArgs {
            logits: args.logits.into(),
            params: args.params.into(),
            history: args.history.into(),
            masks: args.masks.into(),
            scratch: MatArg::at(scratch, Mat::dense(rows, vocab, DType::F32)),
            banned: MatArg::from(args.banned).data(),
            out: MatArg::from(out).data(),
        };
        q.launch(&self.modules, Kernel::Sample, Launch::new([rows, 1, 1], THREADS), kernel)
    }

    fn check_rows(&self, q: &mut CudaQueue, args: &Args<'_, Self>) -> Result<()> {
        let Some(params) = self.ints(q, args.params)? else { return Ok(()) };
        let history = self.ints(q, args.history)?.unwrap_or_default();
        self.check_ids(q, ["sample", "banned token"], args.banned, args.logits.geo.cols)?;
        let rows: &[SampleRow] = bytemuck::cast_slice(&params);
        rows.iter().try_for_each(|row| check::sample_ids(args, row, |entry| history[2 * entry]))
    }
}
