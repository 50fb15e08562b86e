//! Sampling.
#![allow(unsafe_code)]

use lora_core::ops::{SampleArgs as Args, SampleRow};
use lora_core::{DType, MatLayout, Result, check};

use crate::args::{Address, DeviceMat, KernelArgs, MatArg, address, assert_layout};
use crate::device::{Cuda, ViewMut};
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;

/// Threads of a block, as in the kernel.
const THREADS: usize = 512;

/// Blocks that keep a device busy, and the most of them that a cluster may have on any device.
const BLOCKS: usize = 256;
const MAX_SPLITS: usize = 8;

#[repr(C)]
#[derive(Clone, Copy)]
struct SampleArgs {
    logits: MatArg,
    params: MatArg,
    history: MatArg,
    bias: MatArg,
    masks: MatArg,
    scratch: MatArg,
    banned: Address,
    out: Address,
}

assert_layout!(SampleRow is 72 bytes: seed at 16, position at 24, repetition_penalty at 32, history at 44, mask at 68);
assert_layout!(SampleArgs is 208 bytes: logits at 0, params at 32, scratch at 160, banned at 192, out at 200);

// SAFETY: laid out as `SampleArgs` of `sample.cu`.
unsafe impl KernelArgs for SampleArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::Sample];
}

/// See [`lora_core::Backend::sample`].
pub fn sample(
    cuda: &Cuda,
    q: &mut CudaQueue,
    args: &Args<'_, Cuda>,
    out: &ViewMut<'_>,
) -> Result<()> {
    check::sample(args, out.layout)?;
    check_rows(cuda, q, args)?;
    let (rows, vocab) = (args.logits.layout.rows, args.logits.layout.cols);
    let scratch = q.scratch(rows * vocab * size_of::<f32>())?;
    let kernel_args = SampleArgs {
        logits: args.logits.into(),
        params: args.params.into(),
        history: args.history.into(),
        bias: args.bias.into(),
        masks: args.masks.into(),
        scratch: DeviceMat::at(scratch, MatLayout::dense(rows, vocab, DType::F32)).into(),
        banned: address(args.banned),
        out: DeviceMat::from(out).data(),
    };
    cuda.launch(q, Kernel::Sample, launch(rows), kernel_args)
}

fn check_rows(cuda: &Cuda, q: &mut CudaQueue, args: &Args<'_, Cuda>) -> Result<()> {
    let Some(params) = cuda.ints(q, args.params.into())? else { return Ok(()) };
    let history = cuda.ints(q, args.history.into())?.unwrap_or_default();
    let bias = cuda.ints(q, args.bias.into())?.unwrap_or_default();
    cuda.check_ids(q, ["sample", "banned token"], args.banned, args.logits.layout.cols)?;
    let rows: &[SampleRow] = bytemuck::cast_slice(&params);
    let (seen, biased) = (|entry: usize| history[2 * entry], |entry: usize| bias[2 * entry]);
    rows.iter().try_for_each(|row| check::sample_ids(args, row, seen, biased))
}

/// A cluster for each row, of more blocks where rows are few.
fn launch(rows: usize) -> Launch {
    let enough = BLOCKS / rows.max(1);
    let cluster = 1 << enough.clamp(1, MAX_SPLITS).ilog2();
    Launch { cluster, ..Launch::new([rows, 1, cluster], THREADS) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_are_split_among_more_blocks() {
        for (rows, splits) in
            [(0, 8), (1, 8), (32, 8), (33, 4), (64, 4), (128, 2), (129, 1), (999, 1)]
        {
            let launch = launch(rows);
            assert_eq!((launch.grid, launch.cluster), ([rows, 1, splits], splits));
        }
    }
}
