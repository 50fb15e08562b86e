//! [`Cuda`]: one device with its kernels.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::driver::{CudaContext, sys};
use lora_core::{MatLayout, Pool, Result, check};

use crate::error::CudaError;
use crate::library::flashinfer::FlashInfer;
use crate::library::modules::Modules;
use crate::memory::copies::Copies;
use crate::ops::linear::lt::Lt;
use crate::{CudaBuf, CudaQueue, View, kernels};

/// A GPU. It is driven by the thread that made it.
pub struct Cuda {
    pub(crate) context: Arc<CudaContext>,
    pub(crate) modules: Modules,
    pub(crate) flashinfer: FlashInfer,
    pub(crate) lt: RefCell<Lt>,
    pub(crate) copies: RefCell<Copies>,
    /// Counts changes of what recorded steps take for granted about the adapters of sites.
    pub(crate) adapters_changed: Cell<u64>,
    checked: bool,
}

impl Cuda {
    /// Device number `ordinal` of those that the driver shows.
    ///
    /// # Errors
    /// [`CudaError`] saying what is missing: driver, device, cuBLASLt, or the kernels.
    pub fn new(ordinal: usize) -> std::result::Result<Self, CudaError> {
        let (context, kernels) = find(ordinal)?;
        let modules = Modules::load(&kernels)?;
        let flashinfer = FlashInfer::load(&kernels)?;
        let lt = RefCell::new(Lt::new(&context)?);
        let copies = RefCell::new(Copies::new(&context)?);
        let adapters_changed = Cell::new(0);
        Ok(Self { context, modules, flashinfer, lt, copies, adapters_changed, checked: false })
    }

    /// The name of a device that could be used, by all that can be told without loading anything.
    ///
    /// # Errors
    /// Those of [`Cuda::new`].
    pub fn probe(ordinal: usize) -> std::result::Result<String, CudaError> {
        let (context, _) = find(ordinal)?;
        context.name().map_err(CudaError::driver("cuDeviceGetName"))
    }

    /// The same device, which checks numbers that point into tables before it uses them. Each such
    /// op then waits for the device; an engine makes these numbers itself and needs no check.
    #[must_use]
    pub fn checked(self) -> Self {
        Self { checked: true, ..self }
    }

    /// Name of the device, as the driver gives it.
    pub fn device_name(&self) -> String {
        self.context.name().unwrap_or_default()
    }

    /// The integers of a matrix, row by row, where they are to be checked.
    pub(crate) fn ints(&self, q: &mut CudaQueue, view: View<'_>) -> Result<Option<Vec<i32>>> {
        if !self.checked || q.is_recording() {
            return Ok(None);
        }
        Ok(Some(bytemuck::pod_collect_to_vec(&q.download(view)?.wait()?)))
    }

    /// Checks ids that lie in a row of device memory.
    pub(crate) fn check_ids(
        &self,
        q: &mut CudaQueue,
        [op, what]: [&'static str; 2],
        view: View<'_>,
        limit: usize,
    ) -> Result<()> {
        match self.ints(q, view)? {
            Some(ids) => check::ids(op, what, &ids, limit),
            None => Ok(()),
        }
    }

    /// A block with these bytes.
    pub(crate) fn hold(&self, pool: Pool, bytes: &[u8]) -> Result<CudaBuf> {
        CudaBuf::holding(&self.context, pool, &[bytes])
    }
}

/// A device's context, and the folder of the kernels.
fn find(ordinal: usize) -> std::result::Result<(Arc<CudaContext>, PathBuf), CudaError> {
    // SAFETY: loading the libraries runs NVIDIA's initialisation code, as every use of them does.
    if !unsafe { sys::is_culib_present() } {
        let remedy = "install NVIDIA's driver";
        return Err(CudaError::Library { library: "libcuda", remedy });
    }
    // SAFETY: as above.
    if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        let remedy = "install cuBLAS of CUDA 13";
        return Err(CudaError::Library { library: "libcublasLt", remedy });
    }
    let count = CudaContext::device_count().map_err(CudaError::driver("cuDeviceGetCount"))?;
    let count = usize::try_from(count).unwrap_or(0);
    if ordinal >= count {
        return Err(CudaError::NoDevice { ordinal, count });
    }
    let context = CudaContext::new(ordinal);
    let context = context.map_err(CudaError::driver("cuDevicePrimaryCtxRetain"))?;
    // SAFETY: no slices of cudarc are used, whose events this is about. Without them, a new stream does
    // not wait for the whole context, which would spoil what other engines record.
    unsafe { context.disable_event_tracking() };
    let found = context.compute_capability();
    let found = found.map_err(CudaError::driver("cuDeviceGetAttribute"))?;
    check_capability(ordinal, found, || context.name().unwrap_or_default())?;
    Ok((context, kernels::find()?))
}

/// Fails unless the kernels are compiled for a device of this compute capability.
fn check_capability(
    ordinal: usize,
    (major, minor): (i32, i32),
    name: impl FnOnce() -> String,
) -> std::result::Result<(), CudaError> {
    let found = format!("{major}.{minor}");
    if found == kernels::CAPABILITY {
        return Ok(());
    }
    Err(CudaError::Capability { ordinal, name: name(), found })
}

/// Whether all rows of a matrix begin at multiples of 16 bytes.
pub(crate) fn is_aligned(layout: MatLayout) -> bool {
    let size = layout.dtype.size();
    (layout.offset * size).is_multiple_of(16) && (layout.row_stride * size).is_multiple_of(16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_of_another_generation_is_named_with_what_it_has() {
        let check = |found| check_capability(1, found, || "NVIDIA A100".to_owned());
        check((9, 0)).unwrap();
        for (found, text) in [((8, 0), "8.0"), ((9, 1), "9.1"), ((10, 0), "10.0")] {
            let error = check(found).unwrap_err().to_string();
            for part in ["device 1", "NVIDIA A100", text, "allowed: 9.0", "H100"] {
                assert!(error.contains(part), "{part} is not in: {error}");
            }
        }
    }

    #[test]
    fn a_device_that_cannot_be_had_is_an_error() {
        // No machine has so many, and most that run this have no driver either.
        let error = Cuda::probe(1 << 20).unwrap_err();
        let told = matches!(error, CudaError::Library { .. } | CudaError::NoDevice { .. });
        assert!(told || matches!(error, CudaError::Driver { .. }), "{error}");
        let text = Cuda::new(1 << 20).err().unwrap().to_string();
        assert!(!text.is_empty());
    }
}
