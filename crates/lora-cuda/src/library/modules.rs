//! Loaded kernels, by name.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::CString;
use std::path::Path;

use cudarc::driver::{DriverError, result, sys};

use super::functions::Kernel;
use super::kernels::{Source, UNITS, compiled_name};
use crate::error::{CudaError, is_full};

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
            load_unit(folder, unit, &mut functions)?;
        }
        Ok(Self { functions })
    }

    /// A kernel.
    pub fn get(&self, kernel: Kernel) -> Option<sys::CUfunction> {
        self.functions.get(&kernel).copied()
    }
}

/// Loads one fatbin, and finds its kernels.
fn load_unit(
    folder: &Path,
    unit: &Source,
    functions: &mut HashMap<Kernel, sys::CUfunction>,
) -> Result<(), CudaError> {
    let path = folder.join(compiled_name(unit));
    let broken = |cause: String| CudaError::KernelFile { path: path.clone(), cause };
    let refused = |what: &str, error: DriverError| {
        if is_full(error) {
            CudaError::Full { what: "the kernels".to_owned() }
        } else {
            broken(format!("{what}{error:?}"))
        }
    };
    let image = std::fs::read(&path).map_err(|e| broken(e.to_string()))?;
    // SAFETY: the driver reads a fatbin by the lengths in its header; that the file is one
    // of this crate's was checked by the folder's manifest.
    let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
    let module = module.map_err(|e| refused("", e))?;
    for kernel in Kernel::ALL.iter().filter(|kernel| kernel.unit() == unit.name) {
        let name = CString::new(kernel.name()).map_err(|e| broken(e.to_string()))?;
        let missing = |e| refused(&format!("kernel {}: ", kernel.name()), e);
        // SAFETY: the module was loaded above and is never unloaded.
        let function = unsafe { result::module::get_function(module, name) }.map_err(missing)?;
        allow_shared(function, kernel.max_shared()).map_err(missing)?;
        functions.insert(*kernel, function);
    }
    Ok(())
}

/// Lets launches of a function ask for so many bytes of dynamic shared memory.
fn allow_shared(function: sys::CUfunction, bytes: usize) -> Result<(), DriverError> {
    let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function is one of a loaded module.
    unsafe { result::function::set_function_attribute(function, limit, bytes as i32) }
}
