//! Causal attention over paged keys and values.
#![allow(unsafe_code)]

use lora_core::ops::{AttentionArgs as Args, HeadDims};
use lora_core::{Backend, DType, Error, Result, check};

use super::WARP;
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::device::is_aligned;
use crate::queue::Launch;
use crate::{Cuda, CudaQueue, ViewMut};

/// Warps of a block, as in the kernels.
const WARPS: usize = 4;

/// Heads of a block, as in `attention_decode.cu`.
const GROUP: usize = 4;

/// Pairs of row and head of a block, and keys of a tile, as in `attention_prefill.cu`.
const PAIRS: usize = 64;
const KEYS: usize = 64;

/// Blocks that keep a device busy, and the most of them that a cluster may have on any device.
const BLOCKS: usize = 512;
const MOST_SPLITS: usize = 8;

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

// SAFETY: laid out as `AttentionArgs` of `attention.cuh`.
unsafe impl KernelArgs for AttentionArgs {
    const KERNELS: &'static [Kernel] = &[
        Kernel::Attention,
        Kernel::AttentionDecode64,
        Kernel::AttentionDecode128,
        Kernel::AttentionDecode256,
        Kernel::AttentionPrefill64,
        Kernel::AttentionPrefill128,
    ];
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
        let (name, launch) = choose(&Shape::of(args));
        q.launch(&self.modules, name, launch, kernel)
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

/// What the choice of a kernel depends on.
#[derive(Clone, Copy, Debug)]
struct Shape {
    dims: HeadDims,
    rows: usize,
    sequences: usize,
    /// The longest sequence that there may be, in tokens.
    longest: usize,
    queries: DType,
    cache: DType,
    aligned: bool,
}

impl Shape {
    fn of(args: &Args<'_, Cuda>) -> Self {
        let tables = args.block_tables.geo;
        Self {
            dims: args.dims,
            rows: args.queries.geo.rows,
            sequences: tables.rows,
            longest: tables.cols * args.tokens_per_block,
            queries: args.queries.geo.dtype,
            cache: args.k_cache.geo.dtype,
            aligned: [args.queries, args.k_cache, args.v_cache].iter().all(|m| is_aligned(m.geo)),
        }
    }
}

/// Tensor cores where sequences have several rows each, a kernel for single rows where they do not,
/// and one for any operands.
fn choose(of: &Shape) -> (Kernel, Launch) {
    let threads = WARPS * WARP;
    let HeadDims { heads, kv_heads, head_dim } = of.dims;
    let shared_by = heads / kv_heads;
    let narrow = matches!(of.queries, DType::Bf16 | DType::F16);
    let suited = narrow && (of.cache == of.queries || of.cache == DType::F8E4m3);
    let prefill = match head_dim {
        64 => Some(Kernel::AttentionPrefill64),
        128 => Some(Kernel::AttentionPrefill128),
        _ => None,
    };
    let decode = match head_dim {
        64 => Some(Kernel::AttentionDecode64),
        128 => Some(Kernel::AttentionDecode128),
        256 => Some(Kernel::AttentionDecode256),
        _ => None,
    };
    let several = of.rows > of.sequences && shared_by <= PAIRS;
    if let Some(kernel) = prefill.filter(|_| of.aligned && suited && several) {
        let tiles = of.rows.div_ceil(PAIRS / shared_by);
        let shared = 4 * KEYS * head_dim * of.queries.size();
        return (kernel, Launch { shared, ..Launch::new([tiles, kv_heads, 1], threads) });
    }
    if let Some(kernel) = decode.filter(|_| of.aligned) {
        let groups = kv_heads * shared_by.div_ceil(GROUP);
        let enough = (BLOCKS / (of.rows * groups).max(1)).min(of.longest / 32);
        let cluster = 1 << enough.clamp(1, MOST_SPLITS).ilog2();
        return (kernel, Launch { cluster, ..Launch::new([of.rows, groups, cluster], threads) });
    }
    (Kernel::Attention, Launch::new([of.rows, heads, 1], threads))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_chosen_by_rows_heads_and_dtypes() {
        let dims = HeadDims { heads: 32, kv_heads: 8, head_dim: 128 };
        let (queries, cache) = (DType::Bf16, DType::Bf16);
        let decode =
            Shape { dims, rows: 1, sequences: 1, longest: 4096, queries, cache, aligned: true };
        let (kernel, launch) = choose(&decode);
        assert_eq!((kernel, launch.grid), (Kernel::AttentionDecode128, [1, 8, 8]));
        let (_, launch) = choose(&Shape { rows: 256, sequences: 256, ..decode });
        assert_eq!((launch.grid, launch.cluster), ([256, 8, 1], 1));
        let prefill = Shape { rows: 100, cache: DType::F8E4m3, ..decode };
        let (kernel, launch) = choose(&prefill);
        assert_eq!((kernel, launch.grid), (Kernel::AttentionPrefill128, [7, 8, 1]));
        let (kernel, _) = choose(&Shape { queries: DType::F32, ..prefill });
        assert_eq!(kernel, Kernel::AttentionDecode128);
        for other in [
            Shape { aligned: false, ..decode },
            Shape { dims: HeadDims { head_dim: 96, ..dims }, ..prefill },
        ] {
            assert_eq!(choose(&other).0, Kernel::Attention);
        }
    }
}
