//! A stream of work, the scratch memory of its ops, and copies between host and device.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};
use lora_core::{Error, Pool, Result};

use crate::args::DeviceMat;
use crate::error::failed;
use crate::memory::buffer::CudaBuf;
use crate::memory::download::{CudaDownload, HostBlocks, LentBlock};

/// A stream with the scratch memory of its ops.
pub struct CudaQueue {
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
    scratch: Option<CudaBuf>,
    /// `z`, between the shrink and the expand of adapters.
    lora_scratch: Option<CudaBuf>,
    /// Flags by which kernels of this queue signal that inputs are ready.
    ready_flags: CudaBuf,
    /// Scratch memory that was too small, which recorded work still uses.
    outgrown: Vec<CudaBuf>,
    recording: Recording,
    host_blocks: HostBlocks,
    /// Page-locked blocks that uploads are read from, oldest first.
    sources: VecDeque<LentBlock>,
}

/// The most bytes of an upload from pageable memory that the driver copies into its command buffer, so that the
/// host may go on at once. For more, it may wait until the stream has come there.
const MAX_INLINE_UPLOAD: usize = 64 << 10;

/// The most bytes of an upload that goes by way of page-locked memory. Only uploads before the first step are
/// larger.
const MAX_STAGED: usize = 4 << 20;

/// Whether the ops of a queue are recorded rather than run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Recording {
    /// No op of this queue was ever recorded.
    #[default]
    Never,
    /// Ops are being recorded.
    Now,
    /// Ops are being recorded, and one of them lacked scratch memory, so that the recording is of no use.
    Failed,
    /// Ops run, and graphs may use the scratch memory of earlier recordings.
    Before,
}

/// Bytes of two 32-bit words.
const READY_FLAGS_BYTES: usize = 8;

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
            ready_flags: CudaBuf::zeroed(context, Pool::Activations, READY_FLAGS_BYTES)?,
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

    /// Address of the two words by which a shrink signals the GEMM after it that inputs are ready, see
    /// `lora.cuh`.
    pub(crate) fn ready_flags(&self) -> u64 {
        self.ready_flags.address()
    }

    /// Whether ops are recorded rather than run.
    pub(crate) fn is_recording(&self) -> bool {
        matches!(self.recording, Recording::Now | Recording::Failed)
    }

    /// Sets the state of recording, and returns the one before.
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

    /// Copies bytes from the host to the start of a dense matrix. The host may go on at once, and
    /// change `src`, unless there are more than [`MAX_STAGED`] of them.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn upload(&mut self, src: &[u8], dst: DeviceMat) -> Result<()> {
        if src.is_empty() {
            return Ok(());
        }
        let address = dst.data();
        if (MAX_INLINE_UPLOAD + 1..=MAX_STAGED).contains(&src.len()) {
            return self.upload_staged(src, address);
        }
        // SAFETY: the caller has checked that `dst` has as many bytes. `src` is pageable memory,
        // which the driver has read when it returns.
        let copied = unsafe { result::memcpy_htod_async(address, src, self.stream()) };
        copied.map_err(failed("cuMemcpyHtoDAsync"))
    }

    /// As [`CudaQueue::upload`], by way of page-locked memory, so that the host need not wait.
    fn upload_staged(&mut self, src: &[u8], address: u64) -> Result<()> {
        while self.sources.front().is_some_and(LentBlock::is_free) {
            self.sources.pop_front();
        }
        let block = self.host_blocks.take(&self.context, src.len())?;
        let read = self.context.new_event(None).map_err(failed("cuEventCreate"))?;
        // SAFETY: the block has at least as many bytes, all of which are written before they are
        // read, and nothing else refers to it.
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
    pub(crate) fn download(&mut self, src: DeviceMat) -> Result<CudaDownload> {
        let layout = src.layout();
        let bytes = layout.rows * layout.cols * layout.dtype.size();
        let block = self.host_blocks.take(&self.context, bytes.max(1))?;
        if bytes > 0 {
            let mut copy = copy_from(src);
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

    /// Copies the rows `from` of a matrix to those that begin at `to`.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn copy_rows(&mut self, t: DeviceMat, from: Range<usize>, to: usize) -> Result<()> {
        if from.is_empty() || t.layout().cols == 0 {
            return Ok(());
        }
        let target = copy_from(t.slice_rows(to..to + from.len()));
        let mut copy = copy_from(t.slice_rows(from));
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

/// A copy from a matrix; the other side is still to be filled in.
fn copy_from(mat: DeviceMat) -> sys::CUDA_MEMCPY2D {
    let layout = mat.layout();
    let size = layout.dtype.size();
    // A single row may have a pitch below its width, as nothing follows it.
    let pitch = layout.row_stride.max(layout.cols) * size;
    sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcHost: std::ptr::null(),
        srcDevice: mat.data(),
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
        Height: layout.rows,
    }
}
