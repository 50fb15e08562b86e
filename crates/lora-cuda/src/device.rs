//! [`Cuda`]: one device with its kernels.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute};
use cudarc::driver::{CudaContext, DriverError};
use lora_core::{Pool, Result, check};

use crate::args::{DeviceMat, KernelArgs};
use crate::error::CudaError;
use crate::graph::{self, AdaptersEpoch};
use crate::launch::{Launch, launch};
use crate::library::cublaslt::CublasLt;
use crate::library::flashinfer::FlashInfer;
use crate::library::functions::Kernel;
use crate::library::kernels;
use crate::library::modules::Modules;
use crate::memory::buffer::CudaBuf;
use crate::memory::copies::Copies;
use crate::memory::queue::CudaQueue;

/// A matrix of a [`Cuda`], to read.
pub(crate) type View<'a> = lora_core::View<'a, Cuda>;

/// A matrix of a [`Cuda`], to write.
pub(crate) type ViewMut<'a> = lora_core::ViewMut<'a, Cuda>;

/// A GPU. It is driven by the thread that made it.
pub struct Cuda {
    pub(crate) context: Arc<CudaContext>,
    pub(crate) flashinfer: FlashInfer,
    pub(crate) lt: RefCell<CublasLt>,
    pub(crate) copies: RefCell<Copies>,
    pub(crate) epoch: Cell<AdaptersEpoch>,
    /// Streaming multiprocessors, by which launches are cut so that all have work.
    pub(crate) multiprocessors: usize,
    modules: Modules,
    checked: bool,
}

impl Cuda {
    /// Device number `ordinal` of those that the driver shows.
    ///
    /// # Errors
    /// [`CudaError`] saying what is missing: driver, device, cuBLASLt, or the kernels.
    pub fn new(ordinal: usize) -> std::result::Result<Self, CudaError> {
        let (context, kernels) = find(ordinal)?;
        Ok(Self {
            modules: Modules::load(&kernels)?,
            flashinfer: FlashInfer::load(&kernels)?,
            lt: RefCell::new(CublasLt::new(&context)?),
            copies: RefCell::new(Copies::new(&context)?),
            epoch: Cell::default(),
            multiprocessors: multiprocessors(&context)
                .map_err(CudaError::driver("cuDeviceGetAttribute"))?,
            checked: false,
            context,
        })
    }

    /// Checks whether a device can be used, as far as that shows without loading anything, and returns its name.
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

    /// Milliseconds that the device takes from the first to the last op that `work` issues.
    ///
    /// # Errors
    /// Those of the ops, or [`lora_core::Error::Device`].
    pub fn time(
        &self,
        q: &mut CudaQueue,
        work: impl FnOnce(&mut CudaQueue) -> Result<()>,
    ) -> Result<f32> {
        graph::time(&self.context, q, work)
    }

    /// Starts a kernel.
    pub(crate) fn launch<A: KernelArgs>(
        &self,
        q: &CudaQueue,
        kernel: Kernel,
        blocks: Launch,
        args: A,
    ) -> Result<()> {
        launch(&self.modules, q, kernel, blocks, args)
    }

    /// A block of device memory with these bytes.
    pub(crate) fn buffer_with(&self, pool: Pool, bytes: &[u8]) -> Result<CudaBuf> {
        CudaBuf::holding(&self.context, pool, &[bytes])
    }

    /// The integers of a matrix, row by row; `None` where they need no check.
    pub(crate) fn ints(&self, q: &mut CudaQueue, mat: DeviceMat) -> Result<Option<Vec<i32>>> {
        if !self.checked || q.is_recording() {
            return Ok(None);
        }
        Ok(Some(bytemuck::pod_collect_to_vec(&q.download(mat)?.wait()?)))
    }

    /// Checks ids that lie in a row of device memory, on a device that checks numbers.
    pub(crate) fn check_ids(
        &self,
        q: &mut CudaQueue,
        [op, what]: [&'static str; 2],
        view: View<'_>,
        limit: usize,
    ) -> Result<()> {
        match self.ints(q, view.into())? {
            Some(ids) => check::ids(op, what, &ids, limit),
            None => Ok(()),
        }
    }
}

/// The number of streaming multiprocessors of a context's device.
fn multiprocessors(context: &CudaContext) -> std::result::Result<usize, DriverError> {
    let count = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    Ok(usize::try_from(count).unwrap_or(0).max(1))
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
    // SAFETY: the events guard slices of cudarc, which are not used here. Without them, a new stream does
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
