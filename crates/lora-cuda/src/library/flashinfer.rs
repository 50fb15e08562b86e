//! The shared object of FlashInfer's kernels, by its C interface.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char};
use std::path::Path;

use cudarc::driver::sys::CUstream;
use libloading::Library;
use lora_core::{Error, Result};

use super::kernels::LIBRARY;
use crate::args::{Address, assert_layout};
use crate::error::CudaError;
use crate::memory::queue::CudaQueue;

/// `PrefillArgs` of `library.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PrefillArgs {
    pub queries: Address,
    pub keys: Address,
    pub values: Address,
    pub out: Address,
    pub tables: Address,
    pub lists: PrefillLists,
    pub query_stride: i64,
    pub cache_stride: i64,
    pub out_stride: i64,
    pub scale: f32,
    pub rows: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub tokens_per_block: i32,
    /// Positions before its own that a row attends to; -1: all.
    pub before: i32,
}

/// Which block computes which tiles: where its part of the lists ends, and the lists, see `library.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PrefillLists {
    pub block_ends: Address,
    pub heads_of: Address,
    pub tiles: Address,
    pub first_rows: Address,
    pub first_blocks: Address,
    pub rows_of: Address,
    pub keys_of: Address,
}

assert_layout!(PrefillLists is 56 bytes: block_ends at 0, heads_of at 8, keys_of at 48);
assert_layout!(
    PrefillArgs is 152 bytes:
    queries at 0, tables at 32, lists at 40, query_stride at 96, scale at 120, before at 144
);

type Prefill = unsafe extern "C" fn(*const PrefillArgs, CUstream) -> i32;
type Meaning = unsafe extern "C" fn(i32) -> *const c_char;

/// The loaded library.
pub struct FlashInfer {
    prefill: Prefill,
    meaning: Meaning,
    /// Keeps the code of both loaded.
    _library: Library,
}

impl FlashInfer {
    /// Loads the library of a folder of kernels.
    ///
    /// # Errors
    /// [`CudaError::KernelFile`] if it cannot be loaded, or lacks a function.
    pub fn load(folder: &Path) -> std::result::Result<Self, CudaError> {
        let path = folder.join(LIBRARY);
        let broken = |e: libloading::Error| CudaError::KernelFile {
            path: path.clone(),
            cause: e.to_string(),
        };
        // SAFETY: the manifest of the folder was checked, so the file is one of this crate's sources, whose
        // initialisation is that of the CUDA runtime and the C++ library.
        let library = unsafe { Library::new(&path) }.map_err(broken)?;
        // SAFETY: both are declared so in `library.cu`.
        let (prefill, meaning) = unsafe {
            let prefill = *library.get::<Prefill>(c"loramux_prefill").map_err(broken)?;
            (prefill, *library.get::<Meaning>(c"loramux_error").map_err(broken)?)
        };
        Ok(Self { prefill, meaning, _library: library })
    }

    /// Starts the attention of planned rows.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn prefill(&self, q: &CudaQueue, args: &PrefillArgs) -> Result<()> {
        // SAFETY: the op has checked that operands and lists have the extents that `args` gives. The
        // library reads `args` before it returns, and works in the context that is current, the device's.
        let error = unsafe { (self.prefill)(args, q.stream()) };
        if error == 0 {
            return Ok(());
        }
        // SAFETY: returns a constant string for any number.
        let meaning = unsafe { CStr::from_ptr((self.meaning)(error)) };
        Err(Error::Device(format!("{LIBRARY}: prefill: {}", meaning.to_string_lossy())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_absent_or_broken_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let refused = || FlashInfer::load(folder.path()).map(drop).unwrap_err().to_string();
        let absent = refused();
        std::fs::write(folder.path().join(LIBRARY), "no library").unwrap();
        for text in [absent, refused()] {
            assert!(text.contains(LIBRARY) && text.contains("cargo xtask kernels"), "{text}");
        }
    }
}
