//! How the TMA reads a matrix.
#![allow(unsafe_code)]

use std::ffi::c_void;

use cudarc::driver::sys;
use lora_core::{DType, Result};

use crate::args::DeviceMat;
use crate::error::failed;

/// Bytes of a row of a tile: the span of the TMA's widest swizzle, which spreads the rows of a tile over the
/// banks of shared memory as wgmma wants them.
pub const SWIZZLE: usize = 128;

/// A `CUtensorMap`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct TensorMap([u64; 16]);

const _: () = assert!(size_of::<TensorMap>() == size_of::<sys::CUtensorMap>());
const _: () = assert!(size_of::<TensorMap>() == 128 && align_of::<TensorMap>() == 64);

impl TensorMap {
    /// Tiles of `rows` rows by [`SWIZZLE`] bytes of a matrix.
    ///
    /// # Errors
    /// [`lora_core::Error::Device`] if the driver refuses.
    pub fn of(mat: DeviceMat, rows: usize) -> Result<Self> {
        let layout = mat.layout();
        let (dtype, size) = match layout.dtype {
            DType::F16 => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2),
            DType::Bf16 => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2),
            _ => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
        };
        let mut map = Self([0; 16]);
        // SAFETY: the map has the size and alignment of a `CUtensorMap`; the arrays have the lengths for a
        // matrix of two dimensions, of which the innermost has no stride to give.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                dtype,
                2,
                mat.data() as *mut c_void,
                [layout.cols as u64, layout.rows as u64].as_ptr(),
                [(layout.row_stride.max(layout.cols) * size) as u64].as_ptr(),
                [(SWIZZLE / size) as u32, rows as u32].as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        encoded.result().map_err(failed("cuTensorMapEncodeTiled"))?;
        Ok(map)
    }
}
