//! Norms of query and key heads, rotary positions, and the store into the KV cache.
#![allow(unsafe_code)]

use lora_core::ops::{HeadDims, QkvArgs};
use lora_core::{DType, MatLayout, Result, check};

use super::norm::{NormWeightArg, check_norm_slots};
use crate::args::{Address, KernelArgs, MatArg, address, assert_layout};
use crate::device::Cuda;
use crate::launch::Launch;
use crate::library::functions::Kernel;
use crate::memory::queue::CudaQueue;
use crate::ops::common::{WARP, is_aligned, is_vec8};

/// Heads that a block of the general kernel works on at a time.
const WARPS: usize = 8;

/// Threads of a block of the vectorised kernels, and threads that share a head there.
const THREADS: usize = 128;
const LANES: usize = 4;

#[repr(C)]
#[derive(Clone, Copy)]
struct RopeArgs {
    qkv: MatArg,
    cos_sin_table: MatArg,
    k_cache: MatArg,
    v_cache: MatArg,
    q_norm: NormWeightArg,
    k_norm: NormWeightArg,
    positions: Address,
    slots: Address,
    eps: f32,
    k_scale: f32,
    v_scale: f32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
}

assert_layout!(
    RopeArgs is 216 bytes:
    qkv at 0, cos_sin_table at 32, q_norm at 128, k_norm at 152, positions at 176, slots at 184,
    eps at 192, heads at 204, head_dim at 212
);

// SAFETY: laid out as `RopeArgs` of `rope.cu`.
unsafe impl KernelArgs for RopeArgs {
    const KERNELS: &'static [Kernel] = &[
        Kernel::QkNormRopeAppend,
        Kernel::QkNormRopeAppend64,
        Kernel::QkNormRopeAppend128,
        Kernel::QkNormRopeAppend256,
    ];
}

/// See [`lora_core::Backend::qk_norm_rope_append`].
pub fn qk_norm_rope_append(cuda: &Cuda, q: &mut CudaQueue, args: &QkvArgs<'_, Cuda>) -> Result<()> {
    const OP: &str = "qk_norm_rope_append";
    check::qkv(args)?;
    if let Some(positions) = cuda.ints(q, args.positions.into())? {
        let slots = cuda.ints(q, args.kv_slots.into())?.unwrap_or_default();
        check::qkv_ids(args, &positions, &slots)?;
    }
    let (dims, norms) = (args.dims, args.norms.as_ref());
    for w in norms.into_iter().flat_map(|(q, k, _)| [q, k]) {
        check_norm_slots(cuda, OP, q, w)?;
    }
    let kernel_args = RopeArgs {
        qkv: (&args.qkv).into(),
        cos_sin_table: args.cos_sin_table.into(),
        k_cache: (&args.k_cache).into(),
        v_cache: (&args.v_cache).into(),
        q_norm: norms.map_or_else(Default::default, |(q, _, _)| q.into()),
        k_norm: norms.map_or_else(Default::default, |(_, k, _)| k.into()),
        positions: address(args.positions),
        slots: address(args.kv_slots),
        eps: norms.map_or(0.0, |(_, _, eps)| *eps),
        k_scale: args.kv_scales.k,
        v_scale: args.kv_scales.v,
        heads: dims.heads as i32,
        kv_heads: dims.kv_heads as i32,
        head_dim: dims.head_dim as i32,
    };
    let weights = norms.into_iter().flat_map(|(q, k, _)| [q.base.layout, k.base.layout]);
    let floats: Vec<MatLayout> = weights.chain([args.cos_sin_table.layout]).collect();
    let caches = [args.k_cache.layout, args.v_cache.layout];
    let (kernel, launch) = choose(dims, args.qkv.layout, caches, &floats);
    cuda.launch(q, kernel, launch, kernel_args)
}

/// The vectorised kernel for the heads' size where all operands suit it, else the one for any operands. `floats`
/// are the operands in f32.
fn choose(
    dims: HeadDims,
    qkv: MatLayout,
    caches: [MatLayout; 2],
    floats: &[MatLayout],
) -> (Kernel, Launch) {
    let heads = dims.heads + 2 * dims.kv_heads;
    let kernel = match dims.head_dim {
        64 => Some(Kernel::QkNormRopeAppend64),
        128 => Some(Kernel::QkNormRopeAppend128),
        256 => Some(Kernel::QkNormRopeAppend256),
        _ => None,
    };
    let cached = |cache: &MatLayout| match cache.dtype {
        DType::F8E4m3 => is_aligned(*cache),
        _ => is_vec8(&[qkv, *cache]),
    };
    let suited = is_vec8(&[qkv])
        && caches.iter().all(cached)
        && floats.iter().all(|layout| is_aligned(*layout));
    if let Some(kernel) = kernel.filter(|_| suited) {
        let blocks = (qkv.rows * heads).div_ceil(THREADS / LANES);
        return (kernel, Launch::new([blocks, 1, 1], THREADS));
    }
    let grid = [qkv.rows, heads.div_ceil(WARPS), 1];
    let shared = WARPS * dims.head_dim * size_of::<f32>();
    (Kernel::QkNormRopeAppend, Launch { shared, ..Launch::new(grid, WARPS * WARP) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_rotated_is_vec8_where_operands_let_them() {
        let dims = HeadDims { heads: 32, kv_heads: 8, head_dim: 128 };
        let (qkv, cos_sin_table) =
            (MatLayout::dense(3, 6144, DType::Bf16), MatLayout::dense(50, 128, DType::F32));
        let cache = |dtype| MatLayout::dense(64, 1024, dtype);
        for dtype in [DType::Bf16, DType::F8E4m3] {
            let (kernel, launch) = choose(dims, qkv, [cache(dtype); 2], &[cos_sin_table]);
            assert_eq!((kernel, launch.grid), (Kernel::QkNormRopeAppend128, [5, 1, 1]));
        }
        let same = [cache(DType::Bf16); 2];
        for (dims, qkv, caches, cos_sin_table) in [
            (HeadDims { head_dim: 96, ..dims }, qkv, same, cos_sin_table),
            (dims, MatLayout { offset: 4, ..qkv }, same, cos_sin_table),
            (dims, MatLayout { dtype: DType::F32, ..qkv }, same, cos_sin_table),
            (dims, qkv, [cache(DType::F16); 2], cos_sin_table),
            (dims, qkv, [cache(DType::F8E4m3), cache(DType::F32)], cos_sin_table),
            (dims, qkv, same, MatLayout { offset: 2, ..cos_sin_table }),
        ] {
            let (kernel, launch) = choose(dims, qkv, caches, &[cos_sin_table]);
            assert_eq!((kernel, launch.grid), (Kernel::QkNormRopeAppend, [3, 6, 1]));
        }
    }
}
