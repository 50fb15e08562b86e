//! Blocks of device memory.
#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};
use lora_core::{Error, Pool, Result};

use crate::error::{failed, is_full};

/// A block of device memory; dropping it waits for the device and frees it.
pub struct CudaBuf {
    address: sys::CUdeviceptr,
    bytes: usize,
    context: Arc<CudaContext>,
}

impl CudaBuf {
    /// A block of `bytes` zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Device`].
    pub(crate) fn zeroed(context: &Arc<CudaContext>, pool: Pool, bytes: usize) -> Result<Self> {
        let buf = Self::unwritten(context, pool, bytes)?;
        // SAFETY: the block has that many bytes and nothing else refers to it.
        let zeroed = unsafe { sys::cuMemsetD8_v2(buf.address, 0, bytes.max(1)).result() };
        zeroed.map_err(failed("cuMemsetD8"))?;
        wait()?;
        Ok(buf)
    }

    /// A block of `bytes` bytes with undefined contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Device`] if the device refuses for another reason.
    pub(crate) fn unwritten(context: &Arc<CudaContext>, pool: Pool, bytes: usize) -> Result<Self> {
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        // SAFETY: the context is current, and an empty block is asked for as one byte.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|cause| {
            let known = result::mem_get_info();
            let available = known.ok().map(|(free, _)| free);
            // The driver may report another error for a size above that of any device.
            if is_full(cause) || available.is_some_and(|free| bytes > free) {
                Error::OutOfMemory { pool, requested: bytes, available }
            } else {
                failed("cuMemAlloc")(cause)
            }
        })?;
        Ok(Self { address, bytes, context: context.clone() })
    }

    /// A block with the bytes of all `parts`, one after another, all of them copied when this returns.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Device`].
    pub(crate) fn holding(context: &Arc<CudaContext>, pool: Pool, parts: &[&[u8]]) -> Result<Self> {
        let buf = Self::zeroed(context, pool, parts.iter().map(|part| part.len()).sum())?;
        let mut address = buf.address;
        for part in parts {
            // SAFETY: the block has as many bytes as the parts together.
            unsafe { result::memcpy_htod_sync(address, part) }.map_err(failed("cuMemcpyHtoD"))?;
            address += part.len() as u64;
        }
        wait()?;
        Ok(buf)
    }

    /// Its address.
    pub(crate) fn address(&self) -> sys::CUdeviceptr {
        self.address
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

/// Waits for the default stream, on which blocks are filled. To wait for the whole context would spoil
/// what other engines record.
fn wait() -> Result<()> {
    // SAFETY: null names the default stream of the current context.
    unsafe { result::stream::synchronize(std::ptr::null_mut()) }
        .map_err(failed("cuStreamSynchronize"))
}

impl Drop for CudaBuf {
    fn drop(&mut self) {
        // Failures cannot be reported from here; both mean that the device is lost.
        let _ = self.context.bind_to_thread();
        // SAFETY: the address came from `malloc_sync` and is freed once.
        let _ = unsafe { result::free_sync(self.address) };
    }
}
