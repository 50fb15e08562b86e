//! Page-locked memory, and copies to the host that overlap the work issued after them.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, result};
use lora_core::Result;

use crate::error::failed;

/// Page-locked blocks that are free for reuse: to allocate one takes long.
#[derive(Clone, Default)]
pub struct HostBlocks(Rc<RefCell<Vec<HostBlock>>>);

/// A block of page-locked host memory.
pub struct HostBlock {
    address: *mut u8,
    bytes: usize,
    context: Arc<CudaContext>,
}

/// A block that the device reads or writes until an event comes; dropping it frees it for reuse.
pub(crate) struct LentBlock {
    block: Option<HostBlock>,
    blocks: HostBlocks,
    done: CudaEvent,
}

/// Bytes on their way to the host.
pub struct CudaDownload {
    block: LentBlock,
    bytes: usize,
}

impl HostBlocks {
    /// A block of at least `bytes` bytes.
    ///
    /// # Errors
    /// [`lora_core::Error::Device`].
    pub(crate) fn take(&self, context: &Arc<CudaContext>, bytes: usize) -> Result<HostBlock> {
        let mut free = self.0.borrow_mut();
        if let Some(index) = free.iter().position(|block| block.bytes >= bytes) {
            return Ok(free.swap_remove(index));
        }
        let bytes = bytes.next_power_of_two();
        // SAFETY: nothing is assumed of the memory, which is freed once, when the block is dropped.
        let address = unsafe { result::malloc_host(bytes, 0) }.map_err(failed("cuMemHostAlloc"))?;
        Ok(HostBlock { address: address.cast(), bytes, context: context.clone() })
    }
}

impl HostBlock {
    /// Its address.
    pub(crate) fn address(&self) -> *mut u8 {
        self.address
    }
}

impl Drop for HostBlock {
    fn drop(&mut self) {
        // A failure cannot be reported from here.
        let _ = self.context.bind_to_thread();
        // SAFETY: the address came from `malloc_host` and is freed once.
        let _ = unsafe { result::free_host(self.address.cast()) };
    }
}

impl LentBlock {
    /// A block of `blocks` that the device uses until `done` has come.
    pub(crate) fn new(blocks: HostBlocks, block: HostBlock, done: CudaEvent) -> Self {
        Self { block: Some(block), blocks, done }
    }

    /// Whether the device is done with it.
    pub(crate) fn is_free(&self) -> bool {
        self.done.is_complete()
    }
}

impl Drop for LentBlock {
    /// The device may still use the block.
    fn drop(&mut self) {
        // A lost device uses nothing.
        let _ = self.done.synchronize();
        self.blocks.0.borrow_mut().extend(self.block.take());
    }
}

impl CudaDownload {
    /// `bytes` bytes that are in `block` once it is free.
    pub(crate) fn new(block: LentBlock, bytes: usize) -> Self {
        Self { block, bytes }
    }

    /// Waits for the bytes, and for no work that was issued after the download.
    ///
    /// # Errors
    /// [`lora_core::Error::Device`] if any of the work before failed.
    pub(crate) fn wait(self) -> Result<Vec<u8>> {
        let LentBlock { block, done, .. } = &self.block;
        done.synchronize().map_err(failed("cuEventSynchronize"))?;
        // SAFETY: the device has written that many bytes, and writes no more.
        let bytes = |block: &HostBlock| unsafe {
            std::slice::from_raw_parts(block.address, self.bytes).to_vec()
        };
        Ok(block.as_ref().map_or_else(Vec::new, bytes))
    }
}
