//! Causal attention over paged keys and values.
#![allow(unsafe_code)]

use lora_core::ops::AttentionArgs as Args;
use lora_core::{Backend, Error, Result, check};

use super::WARP;
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::queue::Launch;
use crate::{Cuda, CudaQueue, ViewMut};

/// Warps that share the keys of a row's head, as in `attention.cu`.
const WARPS: usize = 4;

/// The largest head of `attention.cu`.
const MAX_HEAD_DIM: usize = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct AttentionArgs {
    queries: MatArg,
    k_cache: MatArg,
    v_cache: MatArg,
    out: MatArg,
    sequences: Address,
    positions: Address,
    tables: Address,
    table_stride: i64,
    scale: f32,
    v_scale: f32,
    tokens_per_block: i32,
    window: i32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
}

// SAFETY: laid out as `AttentionArgs` of `attention.cu`.
unsafe impl KernelArgs for AttentionArgs {
    const KERNEL: Kernel = Kernel::Attention;
}

impl Cuda {
    /// See [`lora_core::Backend::attention`].
    pub(crate) fn attend(
        &self,
        q: &mut CudaQueue,
        args: &Args<'_, Self>,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        check::attention(args, out.geo)?;
        let dims = args.dims;
        if dims.head_dim > MAX_HEAD_DIM {
            let what = format!("heads of {}, above {MAX_HEAD_DIM}", dims.head_dim);
            return Err(Error::Unsupported { op: "attention", backend: Self::NAME, what });
        }
        self.check_paging(q, args)?;
        let kernel = AttentionArgs {
            queries: args.queries.into(),
            k_cache: args.k_cache.into(),
            v_cache: args.v_cache.into(),
            out: out.into(),
            sequences: MatArg::from(args.sequence_of_row).data(),
            positions: MatArg::from(args.positions).data(),
            tables: MatArg::from(args.block_tables).data(),
            table_stride: args.block_tables.geo.row_stride as i64,
            scale: args.scale * args.kv_scales.k,
            v_scale: args.kv_scales.v,
            tokens_per_block: args.tokens_per_block as i32,
            window: args.window.map_or(0, |w| w.min(i32::MAX as usize) as i32),
            heads: dims.heads as i32,
            kv_heads: dims.kv_heads as i32,
            head_dim: dims.head_dim as i32,
        };
        let launch = Launch::new([args.queries.geo.rows, dims.heads, 1], WARPS * WARP);
        q.launch(&self.modules, launch, kernel)
    }

    fn check_paging(&self, q: &mut CudaQueue, args: &Args<'_, Self>) -> Result<()> {
        let Some(positions) = self.ints(q, args.positions)? else { return Ok(()) };
        let sequences = self.ints(q, args.sequence_of_row)?.unwrap_or_default();
        let tables = self.ints(q, args.block_tables)?.unwrap_or_default();
        let cols = args.block_tables.geo.cols;
        let table = |sequence| &tables[sequence * cols..(sequence + 1) * cols];
        check::attention_ids(args, &positions, &sequences, table)
    }
}
