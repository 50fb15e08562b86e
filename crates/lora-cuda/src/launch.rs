//! Launches of kernels.
#![allow(unsafe_code)]

use std::ffi::c_void;

use cudarc::driver::sys;
use lora_core::{Error, Result};

use crate::args::KernelArgs;
use crate::error::failed;
use crate::library::functions::Kernel;
use crate::library::modules::Modules;
use crate::memory::queue::CudaQueue;

/// Blocks and threads of a launch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Launch {
    /// Blocks in x, y and z; a launch without blocks does nothing.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// Blocks along z that make a cluster; divides their number.
    pub cluster: usize,
}

impl Launch {
    /// `grid` blocks of `threads` threads, each a cluster of its own.
    pub fn new(grid: [usize; 3], threads: usize) -> Self {
        Self { grid, threads, shared: 0, cluster: 1 }
    }
}

/// Starts a kernel.
///
/// # Errors
/// [`Error::Device`].
pub fn launch<A: KernelArgs>(
    modules: &Modules,
    q: &CudaQueue,
    kernel: Kernel,
    launch: Launch,
    args: A,
) -> Result<()> {
    if launch.grid.contains(&0) {
        return Ok(());
    }
    let name = kernel.name();
    let function = modules.get(kernel).filter(|_| A::KERNELS.contains(&kernel));
    let function = function.ok_or_else(|| Error::Device(format!("no kernel {name}")))?;
    let [x, y, z] = launch.grid.map(|blocks| blocks as u32);
    let mut attributes = [dependent_launch(), in_clusters(launch.cluster as u32)];
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: launch.threads as u32,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared as u32,
        hStream: q.stream(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: 1 + u32::from(launch.cluster > 1),
    };
    let mut params = [(&raw const args).cast_mut().cast::<c_void>()];
    // SAFETY: the kernel takes one struct that is laid out as `args` (see `KernelArgs`), which
    // the driver copies before it returns, as it does the configuration.
    let started = unsafe {
        sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), std::ptr::null_mut())
    };
    started.result().map_err(failed(name))
}

/// Programmatic dependent launch: the kernel is made ready while the one before it still runs, and waits for
/// that one's results itself (`enter` of `common.cuh`).
fn dependent_launch() -> sys::CUlaunchAttribute {
    let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    let value = sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
    sys::CUlaunchAttribute { id, pad: [0; 4], value }
}

/// `blocks` blocks along z make a cluster.
fn in_clusters(blocks: u32) -> sys::CUlaunchAttribute {
    let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    let size = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: 1, y: 1, z: blocks };
    let value = sys::CUlaunchAttributeValue { clusterDim: size };
    sys::CUlaunchAttribute { id, pad: [0; 4], value }
}
