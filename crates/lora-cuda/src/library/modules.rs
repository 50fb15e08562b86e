//! Loaded kernels, by name.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::CString;
use std::path::Path;

use cudarc::driver::{DriverError, result, sys};

use crate::CudaError;
use crate::args::Kernel;
use crate::error::is_full;
use crate::library::kernels::{UNITS, compiled_name};
use crate::ops::linear::{stream, tiles};
use crate::ops::lora::shrink;

/// Bytes of dynamic shared memory that a launch may ask for.
fn most_shared(kernel: Kernel) -> i32 {
    match kernel {
        Kernel::LinearStream => stream::SHARED as i32,
        Kernel::LinearTiles
        | Kernel::LinearTilesBegin
        | Kernel::LinearTilesGate
        | Kernel::LinearTilesGateAdded => tiles::SHARED as i32,
        Kernel::LoraShrinkRows1 | Kernel::LoraShrinkRows2 | Kernel::LoraShrinkRows4 => {
            shrink::SHARED as i32
        }
        _ => 128 << 10,
    }
}

/// All kernels, in the context that is current. They stay loaded as long as the context lives,
/// which is until the process ends.
pub struct Modules {
    functions: HashMap<Kernel, sys::CUfunction>,
}

impl Modules {
    /// Loads the kernels of a folder into the current context.
    ///
    /// # Errors
    /// [`CudaError::KernelFile`] for a file that cannot be read or loaded, or lacks a kernel;
    /// [`CudaError::Full`].
    pub fn load(folder: &Path) -> Result<Self, CudaError> {
        let mut functions = HashMap::new();
        for unit in &UNITS {
            let path = folder.join(compiled_name(unit));
            let broken = |cause: String| CudaError::KernelFile { path: path.clone(), cause };
            let refused = |what: &str, error: DriverError| match is_full(error) {
                true => CudaError::Full { what: "the kernels".to_owned() },
                false => broken(format!("{what}{error:?}")),
            };
            let image = std::fs::read(&path).map_err(|e| broken(e.to_string()))?;
            // SAFETY: the driver reads a fatbin by the lengths in its header; that the file is one
            // of this crate's was checked by the folder's manifest.
            let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
            let module = module.map_err(|e| refused("", e))?;
            for kernel in Kernel::ALL.iter().filter(|kernel| kernel.unit() == unit.name) {
                let name = CString::new(kernel.name()).map_err(|e| broken(e.to_string()))?;
                // SAFETY: the module was loaded above and is never unloaded.
                let function = unsafe { result::module::get_function(module, name) };
                let missing = |e| refused(&format!("kernel {}: ", kernel.name()), e);
                let function = function.map_err(missing)?;
                let limit =
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function was found above.
                unsafe {
                    result::function::set_function_attribute(function, limit, most_shared(*kernel))
                }
                .map_err(missing)?;
                functions.insert(*kernel, function);
            }
        }
        Ok(Self { functions })
    }

    /// A kernel.
    pub fn get(&self, kernel: Kernel) -> Option<sys::CUfunction> {
        self.functions.get(&kernel).copied()
    }
}
