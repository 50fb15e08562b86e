//! Causal attention over paged keys and values.
#![allow(unsafe_code)]

pub mod plan;

use lora_core::ops::{AttentionArgs as Args, HeadDims};
use lora_core::{Backend, DType, Error, Result, check};

use self::plan::Prompts;
use crate::args::{Address, DeviceMat, KernelArgs, MatArg, address, assert_layout};
use crate::device::{Cuda, ViewMut};
use crate::launch::Launch;
use crate::library::flashinfer::{PrefillArgs, PrefillLists};
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;
use crate::ops::common::{WARP, is_aligned};

/// Warps of a block, as in `attention.cu` and `attention_decode.cu`.
const WARPS: usize = 4;

/// Query heads of a block, and keys that its warps take at a time, as in `attention_decode.cu`.
const HEADS: usize = 8;
const KEYS_AT_ONCE: usize = 16 * WARPS;

/// Warps of a block, its pairs of row and head, and keys of a tile, as in `attention_prefill.cu`.
const PREFILL_WARPS: usize = 12;
const PAIRS: usize = 16 * PREFILL_WARPS;
const TILE_KEYS: usize = 64;

/// Alignment of its tiles in shared memory, which shared memory itself may not have.
const ALIGNMENT: usize = 1024;

/// The most blocks of a launch along y.
const MAX_BLOCKS: usize = 65_535;

/// Blocks that keep a device busy, and the most of them that a cluster may have on any device.
const BLOCKS: usize = 512;
const MAX_SPLITS: usize = 8;

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
    apart: i32,
}

assert_layout!(
    AttentionArgs is 192 bytes:
    queries at 0, out at 96, sequences at 128, table_stride at 152, scale at 160, window at 172,
    apart at 188
);

// SAFETY: laid out as `AttentionArgs` of `attention.cuh`.
unsafe impl KernelArgs for AttentionArgs {
    const KERNELS: &'static [Kernel] = &[
        Kernel::Attention,
        Kernel::AttentionDecode64,
        Kernel::AttentionDecode96,
        Kernel::AttentionDecode128,
        Kernel::AttentionDecode256,
        Kernel::AttentionPrefill64,
        Kernel::AttentionPrefill128,
    ];
}

impl AttentionArgs {
    /// `apart`: single rows of a sequence are left to the decode kernel.
    fn new(args: &Args<'_, Cuda>, out: &ViewMut<'_>, apart: bool) -> Self {
        Self {
            queries: args.queries.into(),
            k_cache: args.k_cache.into(),
            v_cache: args.v_cache.into(),
            out: out.into(),
            sequences: address(args.sequence_of_row),
            positions: address(args.positions),
            tables: address(args.block_tables),
            table_stride: args.block_tables.layout.row_stride as i64,
            scale: args.scale * args.kv_scales.k,
            v_scale: args.kv_scales.v,
            tokens_per_block: args.tokens_per_block as i32,
            window: args.window.map_or(0, |w| w.min(i32::MAX as usize) as i32),
            heads: args.dims.heads as i32,
            kv_heads: args.dims.kv_heads as i32,
            head_dim: args.dims.head_dim as i32,
            apart: i32::from(apart),
        }
    }
}

/// See [`lora_core::Backend::attention`].
pub fn attention(
    cuda: &Cuda,
    q: &mut CudaQueue,
    args: &Args<'_, Cuda>,
    out: &ViewMut<'_>,
) -> Result<()> {
    check::attention(args, out.layout)?;
    if args.dims.head_dim > MAX_HEAD_DIM {
        let what = format!("heads of {}, above {MAX_HEAD_DIM}", args.dims.head_dim);
        return Err(Error::Unsupported { op: "attention", backend: Cuda::NAME, what });
    }
    check_paging(cuda, q, args)?;
    let shape = AttentionShape::of(args, out);
    // Prompts first, then the single rows beside them, which would keep a tile each.
    let (first, rest) = match planned_prompts(args, &shape, q)? {
        Some(prompts) => {
            cuda.flashinfer.prefill(q, &prefill_args(args, prompts.lists, out))?;
            (None, choose_decode(&shape, shape.sequences).filter(|_| prompts.singles))
        }
        None => {
            let (kernel, launch) = choose(&shape);
            (Some((kernel, launch)), choose_for_rest(&shape, kernel))
        }
    };
    let kernel_args = AttentionArgs::new(args, out, rest.is_some());
    for (kernel, launch) in first.into_iter().chain(rest) {
        cuda.launch(q, kernel, launch, kernel_args)?;
    }
    Ok(())
}

/// The planned prompts, where FlashInfer has a kernel for the operands.
fn planned_prompts(
    args: &Args<'_, Cuda>,
    shape: &AttentionShape,
    q: &CudaQueue,
) -> Result<Option<Prompts>> {
    let Some(plan) = args.plan else { return Ok(None) };
    let prompts = plan.prompts(args)?;
    Ok(prompts.filter(|_| shape.suits_flashinfer() && !q.is_recording()))
}

fn check_paging(cuda: &Cuda, q: &mut CudaQueue, args: &Args<'_, Cuda>) -> Result<()> {
    let Some(positions) = cuda.ints(q, args.positions.into())? else { return Ok(()) };
    let sequences = cuda.ints(q, args.sequence_of_row.into())?.unwrap_or_default();
    let tables = cuda.ints(q, args.block_tables.into())?.unwrap_or_default();
    let cols = args.block_tables.layout.cols;
    let table = |sequence| &tables[sequence * cols..(sequence + 1) * cols];
    check::attention_ids(args, &positions, &sequences, table)
}

/// What the choice of a kernel depends on.
#[derive(Clone, Copy, Debug)]
struct AttentionShape {
    dims: HeadDims,
    rows: usize,
    sequences: usize,
    /// The longest sequence that there may be, in tokens.
    longest: usize,
    queries: DType,
    cache: DType,
    out: DType,
    aligned: bool,
    /// Keys and values have the same stride, and values need no scale.
    same_caches: bool,
}

impl AttentionShape {
    fn of(args: &Args<'_, Cuda>, out: &ViewMut<'_>) -> Self {
        let tables = args.block_tables.layout;
        Self {
            dims: args.dims,
            rows: args.queries.layout.rows,
            sequences: tables.rows,
            longest: tables.cols * args.tokens_per_block,
            queries: args.queries.layout.dtype,
            cache: args.k_cache.layout.dtype,
            out: out.layout.dtype,
            same_caches: args.k_cache.layout.row_stride == args.v_cache.layout.row_stride
                && args.kv_scales.v == 1.0,
            aligned: [args.queries.layout, args.k_cache.layout, args.v_cache.layout, out.layout]
                .into_iter()
                .all(is_aligned),
        }
    }

    fn suits_flashinfer(&self) -> bool {
        let narrow = [self.queries, self.cache, self.out].iter().all(|d| *d == DType::Bf16);
        self.aligned && narrow && self.same_caches
    }

    fn suits_tensor_cores(&self) -> bool {
        let narrow = matches!(self.queries, DType::Bf16 | DType::F16);
        self.aligned && narrow && (self.cache == self.queries || self.cache == DType::F8E4m3)
    }
}

/// What FlashInfer's kernel takes.
fn prefill_args(args: &Args<'_, Cuda>, lists: PrefillLists, out: &ViewMut<'_>) -> PrefillArgs {
    let data = address;
    PrefillArgs {
        queries: data(args.queries),
        keys: data(args.k_cache),
        values: data(args.v_cache),
        out: DeviceMat::from(out).data(),
        tables: data(args.block_tables),
        lists,
        query_stride: args.queries.layout.row_stride as i64,
        cache_stride: args.k_cache.layout.row_stride as i64,
        out_stride: out.layout.row_stride as i64,
        scale: args.scale * args.kv_scales.k,
        rows: args.queries.layout.rows as i32,
        heads: args.dims.heads as i32,
        kv_heads: args.dims.kv_heads as i32,
        head_dim: args.dims.head_dim as i32,
        tokens_per_block: args.tokens_per_block as i32,
        before: args.window.map_or(-1, |w| w.min(i32::MAX as usize) as i32 - 1),
    }
}

/// The prefill kernel where sequences have several rows each, the decode kernel where they do not, both by tensor
/// cores; for operands that do not suit those, the kernel for any operands.
fn choose(of: &AttentionShape) -> (Kernel, Launch) {
    let HeadDims { heads, kv_heads, head_dim } = of.dims;
    let heads_per_kv_head = heads / kv_heads;
    let prefill = match head_dim {
        64 => Some(Kernel::AttentionPrefill64),
        128 => Some(Kernel::AttentionPrefill128),
        _ => None,
    };
    let several = of.rows > of.sequences && heads_per_kv_head <= PAIRS;
    if let Some(kernel) = prefill.filter(|_| of.suits_tensor_cores() && several) {
        let tiles = of.rows.div_ceil(PAIRS / heads_per_kv_head);
        let shared = (PAIRS + 4 * TILE_KEYS) * head_dim * of.queries.size() + ALIGNMENT;
        let launch = Launch::new([kv_heads, tiles, 1], PREFILL_WARPS * WARP);
        return (kernel, Launch { shared, ..launch });
    }
    let decode = choose_decode(of, of.rows).filter(|_| of.suits_tensor_cores());
    decode.unwrap_or((Kernel::Attention, Launch::new([of.rows, heads, 1], WARPS * WARP)))
}

/// The decode kernel, for up to `rows` rows of different sequences.
fn choose_decode(of: &AttentionShape, rows: usize) -> Option<(Kernel, Launch)> {
    let HeadDims { heads, kv_heads, head_dim } = of.dims;
    let kernel = match head_dim {
        64 => Kernel::AttentionDecode64,
        96 => Kernel::AttentionDecode96,
        128 => Kernel::AttentionDecode128,
        256 => Kernel::AttentionDecode256,
        _ => return None,
    };
    let groups = kv_heads * (heads / kv_heads).div_ceil(HEADS);
    let cluster = splits(rows * groups, of.longest);
    let launch = Launch::new([groups, rows.min(MAX_BLOCKS), cluster], WARPS * WARP);
    Some((kernel, Launch { cluster, ..launch }))
}

/// The decode kernel for single rows beside those of prompts, where there are several sequences: in the prefill
/// kernel each would keep a tile of its own busy.
fn choose_for_rest(of: &AttentionShape, chosen: Kernel) -> Option<(Kernel, Launch)> {
    let tiles = matches!(chosen, Kernel::AttentionPrefill64 | Kernel::AttentionPrefill128);
    if tiles && of.sequences > 1 { choose_decode(of, of.sequences) } else { None }
}

/// Blocks that split the keys of a row, where there would be `blocks` in all if none were split: as many as keep the
/// device busy, but none without keys even for the longest sequence.
fn splits(blocks: usize, longest: usize) -> usize {
    let spare = 1 << (BLOCKS / blocks.max(1)).max(1).ilog2();
    longest.div_ceil(KEYS_AT_ONCE).next_power_of_two().min(spare).min(MAX_SPLITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: AttentionShape = AttentionShape {
        dims: HeadDims { heads: 32, kv_heads: 8, head_dim: 128 },
        rows: 1,
        sequences: 1,
        longest: 4096,
        queries: DType::Bf16,
        cache: DType::Bf16,
        out: DType::Bf16,
        aligned: true,
        same_caches: true,
    };

    #[test]
    fn planned_prompts_in_bf16_are_flashinfers() {
        assert!(SHAPE.suits_flashinfer());
        for other in [
            AttentionShape { queries: DType::F16, cache: DType::F16, ..SHAPE },
            AttentionShape { cache: DType::F8E4m3, ..SHAPE },
            AttentionShape { out: DType::F32, ..SHAPE },
            AttentionShape { aligned: false, ..SHAPE },
            AttentionShape { same_caches: false, ..SHAPE },
        ] {
            assert!(!other.suits_flashinfer(), "{other:?}");
        }
    }

    #[test]
    fn kernels_are_chosen_by_rows_heads_and_dtypes() {
        let (decode, dims) = (SHAPE, SHAPE.dims);
        let (kernel, launch) = choose(&decode);
        assert_eq!((kernel, launch.grid), (Kernel::AttentionDecode128, [8, 1, 8]));
        let (_, launch) = choose(&AttentionShape { rows: 256, sequences: 256, ..decode });
        assert_eq!((launch.grid, launch.cluster), ([8, 256, 1], 1));
        let (_, launch) = choose(&AttentionShape { longest: 192, ..decode });
        assert_eq!((launch.grid, launch.cluster), ([8, 1, 4], 4));
        let wide = HeadDims { heads: 40, kv_heads: 4, head_dim: 96 };
        let (kernel, launch) = choose(&AttentionShape { dims: wide, rows: 16, ..decode });
        assert_eq!((kernel, launch.grid), (Kernel::AttentionDecode96, [8, 16, 4]));
        let prefill = AttentionShape { rows: 100, cache: DType::F8E4m3, ..decode };
        let (kernel, launch) = choose(&prefill);
        assert!(
            choose_for_rest(&prefill, kernel).is_none()
                && choose_for_rest(&decode, Kernel::AttentionDecode128).is_none()
        );
        let rest = choose_for_rest(&AttentionShape { sequences: 70, ..prefill }, kernel);
        let (single, of_sequences) = rest.unwrap();
        assert_eq!((single, of_sequences.grid), (Kernel::AttentionDecode128, [8, 70, 1]));
        assert_eq!((kernel, launch.grid), (Kernel::AttentionPrefill128, [8, 3, 1]));
        assert_eq!((launch.threads, launch.shared), (384, 113 << 10));
        for other in [
            AttentionShape { aligned: false, ..decode },
            AttentionShape { queries: DType::F32, ..prefill },
            AttentionShape { cache: DType::F16, ..decode },
            AttentionShape { dims: HeadDims { head_dim: 80, ..dims }, ..prefill },
        ] {
            assert_eq!(choose(&other).0, Kernel::Attention);
        }
    }
}
