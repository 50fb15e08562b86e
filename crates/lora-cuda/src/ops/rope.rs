//! Head norms, rotary positions and the store into the KV cache.
#![allow(unsafe_code)]

use lora_core::ops::QkvArgs;
use lora_core::{Result, check};

use super::WARP;
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::queue::Launch;
use crate::{Cuda, CudaQueue};

/// Heads that a block works on at a time.
const WARPS: usize = 8;

#[repr(C)]
#[derive(Clone, Copy)]
struct RopeArgs {
    qkv: MatArg,
    rotations: MatArg,
    k_cache: MatArg,
    v_cache: MatArg,
    q_norm: Address,
    k_norm: Address,
    positions: Address,
    slots: Address,
    eps: f32,
    k_scale: f32,
    v_scale: f32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
}

// SAFETY: laid out as `RopeArgs` of `rope.cu`.
unsafe impl KernelArgs for RopeArgs {
    const KERNELS: &'static [Kernel] = &[Kernel::QkNormRopeAppend];
}

impl Cuda {
    /// See [`lora_core::Backend::qk_norm_rope_append`].
    pub(crate) fn rotate(&self, q: &mut CudaQueue, args: &QkvArgs<'_, Self>) -> Result<()> {
        check::qkv(args)?;
        if let Some(positions) = self.ints(q, args.positions)? {
            let slots = self.ints(q, args.kv_slots)?.unwrap_or_default();
            check::qkv_ids(args, &positions, &slots)?;
        }
        let (dims, norms) = (args.dims, args.norms);
        let norm = |w| MatArg::from(w).data();
        let kernel = RopeArgs {
            qkv: (&args.qkv).into(),
            rotations: args.rotations.into(),
            k_cache: (&args.k_cache).into(),
            v_cache: (&args.v_cache).into(),
            q_norm: norms.map_or(0, |(q, _, _)| norm(q)),
            k_norm: norms.map_or(0, |(_, k, _)| norm(k)),
            positions: MatArg::from(args.positions).data(),
            slots: MatArg::from(args.kv_slots).data(),
            eps: norms.map_or(0.0, |(_, _, eps)| eps),
            k_scale: args.kv_scales.k,
            v_scale: args.kv_scales.v,
            heads: dims.heads as i32,
            kv_heads: dims.kv_heads as i32,
            head_dim: dims.head_dim as i32,
        };
        let launch = Launch {
            grid: [args.qkv.geo.rows, (dims.heads + 2 * dims.kv_heads).div_ceil(WARPS), 1],
            threads: WARPS * WARP,
            shared: WARPS * dims.head_dim * size_of::<f32>(),
            cluster: 1,
        };
        q.launch(&self.modules, Kernel::QkNormRopeAppend, launch, kernel)
    }
}
