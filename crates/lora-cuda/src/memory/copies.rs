//! Copies of adapters to the device, which overlap the work of queues.
//!
//! A stream of its own copies from page-locked memory; a queue waits for a copy on the device, not on
//! the host. Blocks that are replaced are freed once the work that may read them is done.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};
use lora_core::{Error, Pool, Result};

use crate::args::Address;
use crate::error::{CudaError, failed};
use crate::memory::buffer::CudaBuf;
use crate::memory::download::{HostBlock, HostBlocks};
use crate::memory::queue::CudaQueue;

/// Alignment of the tensors of a block: that of blocks of their own.
const ALIGNMENT: usize = 256;

/// Bytes of a piece, which is copied at once.
const PIECE: usize = 4 << 20;

/// Pieces that may be in flight while the next one is filled.
const PIECES: usize = 4;

/// Bytes that a tensor of `bytes` bytes takes in a block.
pub(crate) fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// Tensors that go into one block, one after another.
pub(crate) struct CopyParts<'a> {
    start: Address,
    parts: Vec<(usize, &'a [u8])>,
    end: usize,
}

impl<'a> CopyParts<'a> {
    /// No tensors yet, for a block at `start`.
    pub(crate) fn new(start: Address) -> Self {
        Self { start, parts: Vec::new(), end: 0 }
    }

    /// Adds a tensor and returns its address.
    pub(crate) fn push(&mut self, bytes: &'a [u8]) -> Address {
        let offset = self.end;
        self.parts.push((offset, bytes));
        self.end += padded(bytes.len());
        self.start + offset as u64
    }

    /// Writes the part of the block that begins at `from` to `piece`, but for the gaps.
    fn fill(&self, piece: &mut [u8], from: usize) {
        let until = from + piece.len();
        for (offset, bytes) in &self.parts {
            let (start, end) = ((*offset).max(from), (offset + bytes.len()).min(until));
            if start < end {
                let source = &bytes[start - offset..end - offset];
                piece[start - from..end - from].copy_from_slice(source);
            }
        }
    }
}

/// Page-locked memory from which one piece is copied.
struct Stage {
    memory: HostBlock,
    /// When the device has read it.
    read: CudaEvent,
}

/// The stream of copies.
pub(crate) struct Copies {
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
    stages: VecDeque<Stage>,
    /// Blocks that were replaced, with the end of the work that may read them.
    retired: VecDeque<(CudaBuf, CudaEvent)>,
}

impl Copies {
    /// A new stream.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub(crate) fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, CudaError> {
        let stream = context.new_stream().map_err(CudaError::driver("cuStreamCreate"))?;
        let (stages, retired) = (VecDeque::new(), VecDeque::new());
        Ok(Self { stream, context: context.clone(), stages, retired })
    }

    /// A block for adapters, with undefined contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Device`].
    pub(crate) fn block(&mut self, bytes: usize) -> Result<CudaBuf> {
        self.free_retired();
        let block = CudaBuf::unwritten(&self.context, Pool::Adapters, bytes);
        match block {
            Err(Error::OutOfMemory { .. }) if !self.retired.is_empty() => {
                self.free_all_retired();
                CudaBuf::unwritten(&self.context, Pool::Adapters, bytes)
            }
            block => block,
        }
    }

    /// Copies tensors into their block, so that later ops of the queue find them there. They have been
    /// read when this returns.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn send(
        &mut self,
        q: &CudaQueue,
        block: &CudaBuf,
        parts: &CopyParts<'_>,
    ) -> Result<()> {
        assert!(parts.start == block.address() && parts.end <= block.len(), "parts of this block");
        for from in (0..parts.end).step_by(PIECE) {
            let stage = self.free_stage()?;
            let bytes = PIECE.min(parts.end - from);
            // SAFETY: the memory has `PIECE` bytes, all of which were written when it was made; the
            // device has read what was there before, and nothing else refers to it.
            let piece = unsafe { std::slice::from_raw_parts_mut(stage.memory.address(), bytes) };
            parts.fill(piece, from);
            let target = block.address() + from as u64;
            // SAFETY: the block has as many bytes from there on. The piece is neither written nor
            // freed before `read` has come, which is recorded behind the copy.
            let copied =
                unsafe { result::memcpy_htod_async(target, piece, self.stream.cu_stream()) };
            copied.map_err(failed("cuMemcpyHtoDAsync"))?;
            stage.read.record(&self.stream).map_err(failed("cuEventRecord"))?;
            self.stages.push_back(stage);
        }
        let sent = self.context.new_event(None).map_err(failed("cuEventCreate"))?;
        sent.record(&self.stream).map_err(failed("cuEventRecord"))?;
        let no_flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are of this context. The driver keeps what it needs of the event.
        unsafe { result::stream::wait_event(q.stream(), sent.cu_event(), no_flags) }
            .map_err(failed("cuStreamWaitEvent"))
    }

    /// Frees a block once what was issued to the queue so far is done.
    ///
    /// # Errors
    /// [`Error::Device`]; the block is then freed at once, which waits for the device.
    pub(crate) fn retire(&mut self, q: &CudaQueue, block: CudaBuf) -> Result<()> {
        let unread = self.context.new_event(None).map_err(failed("cuEventCreate"))?;
        q.mark(&unread)?;
        self.retired.push_back((block, unread));
        Ok(())
    }

    /// Frees the blocks that nothing reads any more.
    fn free_retired(&mut self) {
        while self.retired.front().is_some_and(|(_, unread)| unread.is_complete()) {
            self.retired.pop_front();
        }
    }

    /// Waits until nothing reads the replaced blocks, and frees them.
    fn free_all_retired(&mut self) {
        for (_, unread) in &self.retired {
            // A lost device reads nothing.
            let _ = unread.synchronize();
        }
        self.retired.clear();
    }

    /// Memory for the next piece, whose last contents the device has read. The caller fills it, and puts it at the
    /// end of `stages`.
    fn free_stage(&mut self) -> Result<Stage> {
        if self.stages.len() < PIECES {
            let memory = HostBlocks::default().take(&self.context, PIECE)?;
            // SAFETY: the memory has at least `PIECE` bytes, and nothing else refers to it yet.
            unsafe { memory.address().write_bytes(0, PIECE) };
            let read = self.context.new_event(None).map_err(failed("cuEventCreate"))?;
            return Ok(Stage { memory, read });
        }
        let stage = self.stages.pop_front();
        let stage = stage.ok_or_else(|| Error::Device("no memory for copies".to_owned()))?;
        // Where this fails, the device is lost and reads no more.
        stage.read.synchronize().map_err(failed("cuEventSynchronize"))?;
        Ok(stage)
    }
}

impl Drop for Copies {
    /// The device may still read stages and replaced blocks.
    fn drop(&mut self) {
        // A lost device reads no more either.
        let _ = self.stream.synchronize();
        self.free_all_retired();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_lie_apart_and_pieces_hold_their_parts_of_them() {
        let tensors = [vec![1u8; 300], Vec::new(), vec![2; 256], vec![3; 5]];
        let mut parts = CopyParts::new(1 << 20);
        let places = tensors.each_ref().map(|tensor| parts.push(tensor) - (1 << 20));
        assert_eq!(places, [0, 512, 512, 768]);
        assert_eq!(parts.end, tensors.iter().map(|tensor| padded(tensor.len())).sum::<usize>());
        let mut whole = vec![9; parts.end];
        parts.fill(&mut whole, 0);
        for (tensor, place) in tensors.iter().zip(places) {
            assert_eq!(whole[place as usize..][..tensor.len()], tensor[..]);
        }
        assert!(whole[300..512].iter().all(|byte| *byte == 9), "gaps are left alone");
        for piece in [1, 7, 256, 1000, 5000] {
            let mut joined = vec![9; parts.end];
            for (i, bytes) in joined.chunks_mut(piece).enumerate() {
                parts.fill(bytes, i * piece);
            }
            assert_eq!(joined, whole, "pieces of {piece}");
        }
    }
}
