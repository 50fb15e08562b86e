//! A stream of work, launches on it, and copies between host and device.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};
use lora_core::{Error, MatLayout, Pool, Result};

use crate::args::{Kernel, KernelArgs};
use crate::error::failed;
use crate::library::modules::Modules;
use crate::memory::download::{CudaDownload, HostBlocks, LentBlock};
use crate::{CudaBuf, View, ViewMut};

/// A stream with the scratch memory of its ops.
pub struct CudaQueue {
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
    scratch: Option<CudaBuf>,
    /// Sums of adapters between their two products.
    lora_scratch: Option<CudaBuf>,
    /// By which kernels of this queue tell each other that inputs are there.
    input_words: CudaBuf,
    /// Scratch memory that was too small, which recorded work still uses.
    outgrown: Vec<CudaBuf>,
    recording: Recording,
    host_blocks: HostBlocks,
    /// What uploads are read from, oldest first.
    sources: VecDeque<LentBlock>,
}

/// Bytes of an upload from pageable memory that the driver takes along with the order; for more, it
/// may wait until the stream has come there, and the host with it.
const TAKEN_ALONG: usize = 64 << 10;

/// The most bytes of an upload that page-locked memory is kept for. Only what comes before the first
/// step is larger.
const MAX_STAGED: usize = 4 << 20;

/// Whether ops are recorded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Recording {
    /// They never were.
    #[default]
    Never,
    /// They are.
    Now,
    /// They are, and one of them lacked scratch memory, so that the recording is of no use.
    Failed,
    /// They were.
    Before,
}

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug)]
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
    /// `blocks` blocks of `threads` threads.
    pub fn new(grid: [usize; 3], threads: usize) -> Self {
        Self { grid, threads, shared: 0, cluster: 1 }
    }
}

/// Bytes of two words.
const INPUT_WORDS: usize = 8;

impl CudaQueue {
    /// A new stream.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        Ok(Self {
            stream: context.new_stream().map_err(failed("cuStreamCreate"))?,
            context: context.clone(),
            scratch: None,
            lora_scratch: None,
            input_words: CudaBuf::zeroed(context, Pool::Activations, INPUT_WORDS)?,
            outgrown: Vec::new(),
            recording: Recording::Never,
            host_blocks: HostBlocks::default(),
            sources: VecDeque::new(),
        })
    }

    /// The stream's handle.
    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    /// Address of at least `bytes` bytes for the next op alone.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn scratch(&mut self, bytes: usize) -> Result<u64> {
        self.grown(|q| &mut q.scratch, bytes)
    }

    /// Address of at least `bytes` bytes that the ops of the base layer do not touch.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn lora_scratch(&mut self, bytes: usize) -> Result<u64> {
        self.grown(|q| &mut q.lora_scratch, bytes)
    }

    /// Address of the two words by which kernels tell that inputs are there, see `lora.cuh`.
    pub(crate) fn input_words(&self) -> u64 {
        self.input_words.address()
    }

    /// Whether ops are recorded rather than run.
    pub(crate) fn is_recording(&self) -> bool {
        matches!(self.recording, Recording::Now | Recording::Failed)
    }

    /// See [`Recording`]; returns what was.
    pub(crate) fn set_recording(&mut self, recording: Recording) -> Recording {
        std::mem::replace(&mut self.recording, recording)
    }

    /// Makes a block of scratch memory large enough, and returns where it is.
    fn grown(
        &mut self,
        block: impl Fn(&mut Self) -> &mut Option<CudaBuf>,
        bytes: usize,
    ) -> Result<u64> {
        if block(self).as_ref().is_none_or(|held| held.len() < bytes) {
            let held = block(self).take();
            match self.recording {
                // Freed before another is made: freeing waits for the ops that use it.
                Recording::Never => drop(held),
                Recording::Before => self.outgrown.extend(held),
                Recording::Now | Recording::Failed => {
                    *block(self) = held;
                    self.recording = Recording::Failed;
                    return Err(Error::Device("no memory can be had in a recording".to_owned()));
                }
            }
            let size = bytes.next_power_of_two();
            *block(self) = Some(CudaBuf::zeroed(&self.context, Pool::Activations, size)?);
        }
        Ok(block(self).as_ref().map_or(0, CudaBuf::address))
    }

    /// Marks the point that the work has reached.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn mark(&self, event: &CudaEvent) -> Result<()> {
        event.record(&self.stream).map_err(failed("cuEventRecord"))
    }

    /// Starts a kernel.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn launch<A: KernelArgs>(
        &mut self,
        modules: &Modules,
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
        let mut attributes = [early_start(), in_clusters(launch.cluster as u32)];
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared as u32,
            hStream: self.stream(),
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

    /// Copies bytes from the host to the start of a dense matrix. The host may go on at once, and
    /// change `src`, unless there are more than [`MAX_STAGED`] of them.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn upload(&mut self, src: &[u8], dst: &ViewMut<'_>) -> Result<()> {
        if src.is_empty() {
            return Ok(());
        }
        let address = dst.buf.address() + (dst.layout.offset * dst.layout.dtype.size()) as u64;
        if (TAKEN_ALONG + 1..=MAX_STAGED).contains(&src.len()) {
            return self.upload_staged(src, address);
        }
        // SAFETY: the caller has checked that `dst` has as many bytes. `src` is pageable memory,
        // which the driver has read when it returns.
        let copied = unsafe { result::memcpy_htod_async(address, src, self.stream()) };
        copied.map_err(failed("cuMemcpyHtoDAsync"))
    }

    /// As [`CudaQueue::upload`], by way of page-locked memory that the device reads by itself.
    fn upload_staged(&mut self, src: &[u8], address: u64) -> Result<()> {
        while self.sources.front().is_some_and(LentBlock::is_free) {
            self.sources.pop_front();
        }
        let block = self.host_blocks.take(&self.context, src.len())?;
        let read = self.context.new_event(None).map_err(failed("cuEventCreate"))?;
        // SAFETY: the block has at least as many bytes, all of which are written before they are
        // read, and nobody else knows it.
        let staged = unsafe {
            std::ptr::copy_nonoverlapping(src.as_ptr(), block.address(), src.len());
            std::slice::from_raw_parts(block.address(), src.len())
        };
        // SAFETY: the caller has checked that the matrix has as many bytes. The block is neither
        // written nor freed before `read` has come, which is recorded behind the copy.
        let copied = unsafe { result::memcpy_htod_async(address, staged, self.stream()) };
        copied.map_err(failed("cuMemcpyHtoDAsync"))?;
        self.mark(&read)?;
        self.sources.push_back(LentBlock::new(self.host_blocks.clone(), block, read));
        Ok(())
    }

    /// Starts to copy a matrix to the host.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn download(&mut self, src: View<'_>) -> Result<CudaDownload> {
        let bytes = src.layout.rows * src.layout.cols * src.layout.dtype.size();
        let block = self.host_blocks.take(&self.context, bytes.max(1))?;
        if bytes > 0 {
            let mut copy = rows_of(src.buf, src.layout, src.layout.rows);
            copy.dstMemoryType = sys::CUmemorytype::CU_MEMORYTYPE_HOST;
            copy.dstHost = block.address().cast();
            copy.dstPitch = copy.WidthInBytes;
            self.copy(&copy)?;
        }
        let done = self.context.new_event(None).map_err(failed("cuEventCreate"))?;
        self.mark(&done)?;
        let block = LentBlock::new(self.host_blocks.clone(), block, done);
        Ok(CudaDownload::new(block, bytes))
    }

    /// Copies `count` rows of a matrix, from row `from` to row `to`.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn copy_rows(
        &mut self,
        t: &ViewMut<'_>,
        from: usize,
        to: usize,
        count: usize,
    ) -> Result<()> {
        if count == 0 || t.layout.cols == 0 {
            return Ok(());
        }
        let part = |start| t.layout.slice_rows(start..start + count);
        let target = rows_of(t.buf, part(to), count);
        let mut copy = rows_of(t.buf, part(from), count);
        copy.dstMemoryType = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        copy.dstDevice = target.srcDevice;
        copy.dstPitch = target.srcPitch;
        self.copy(&copy)
    }

    fn copy(&mut self, copy: &sys::CUDA_MEMCPY2D) -> Result<()> {
        // SAFETY: both sides have `Height` rows of `WidthInBytes` bytes, a pitch apart.
        let copied = unsafe { sys::cuMemcpy2DAsync_v2(copy, self.stream()).result() };
        copied.map_err(failed("cuMemcpy2DAsync"))
    }

    /// Waits until the work so far is done.
    ///
    /// # Errors
    /// [`Error::Device`] if any of it failed.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(failed("cuStreamSynchronize"))
    }
}

/// The attribute of a launch by which a kernel is made ready while the one before it still runs, whose
/// results it waits for itself (`enter` of `common.cuh`).
fn early_start() -> sys::CUlaunchAttribute {
    let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    let value = sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
    sys::CUlaunchAttribute { id, pad: [0; 4], value }
}

/// The attribute of a launch by which `blocks` blocks along z make a cluster.
fn in_clusters(blocks: u32) -> sys::CUlaunchAttribute {
    let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    let size = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: 1, y: 1, z: blocks };
    let value = sys::CUlaunchAttributeValue { clusterDim: size };
    sys::CUlaunchAttribute { id, pad: [0; 4], value }
}

/// A copy from a matrix; the other side is still to be filled in.
fn rows_of(buf: &CudaBuf, layout: MatLayout, rows: usize) -> sys::CUDA_MEMCPY2D {
    let size = layout.dtype.size();
    // The pitch of a single row may be less than its width, and means nothing.
    let pitch = layout.row_stride.max(layout.cols) * size;
    sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcHost: std::ptr::null(),
        srcDevice: buf.address() + (layout.offset * size) as u64,
        srcArray: std::ptr::null_mut(),
        srcPitch: pitch,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: std::ptr::null_mut(),
        dstDevice: 0,
        dstArray: std::ptr::null_mut(),
        dstPitch: pitch,
        WidthInBytes: layout.cols * size,
        Height: rows,
    }
}
