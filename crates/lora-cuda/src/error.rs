//! Errors of opening and of driving a device.

use std::path::PathBuf;

use cudarc::driver::{DriverError, sys};
use thiserror::Error;

/// A GPU that cannot be used, or kernels that do not fit it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// A library of NVIDIA is not installed.
    #[error("{library} cannot be loaded; {remedy}, or use the CPU")]
    Library {
        /// Its name.
        library: &'static str,
        /// What to install.
        remedy: &'static str,
    },
    /// There is no device of that number.
    #[error("there is no CUDA device {ordinal}: the driver shows {count}")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device is of another generation than the kernels.
    #[error(
        "CUDA device {ordinal} ({name}) has compute capability {found}; allowed: {}, as of an \
         H100 or H200",
        crate::library::requirements::CAPABILITY
    )]
    Capability {
        /// Number of the device.
        ordinal: usize,
        /// Its name.
        name: String,
        /// What it has.
        found: String,
    },
    /// The kernels are in none of the places where they are looked for.
    #[error(
        "no compiled kernels in {}; run `cargo xtask kernels`, or set {} to their folder",
        list(.searched),
        crate::library::requirements::FOLDER_VARIABLE
    )]
    NoKernels {
        /// The places.
        searched: Vec<PathBuf>,
    },
    /// The kernels were compiled from other sources.
    #[error(
        "the kernels in {} are of version {found}; this program needs {wanted}: run `cargo xtask \
         kernels` again", .folder.display()
    )]
    KernelVersion {
        /// Where they are.
        folder: PathBuf,
        /// Their version.
        found: String,
        /// The version of this crate's sources.
        wanted: String,
    },
    /// A file of the kernels cannot be used.
    #[error("{}: {cause}; run `cargo xtask kernels` again", .path.display())]
    KernelFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// The device has no memory left for something whose size only the driver knows.
    #[error(
        "the device is full: no memory is left for {what}; end other programs that use it, or use \
         the CPU"
    )]
    Full {
        /// What there was no room for.
        what: String,
    },
    /// A call of the driver failed.
    #[error("{call}: {cause:?}")]
    Driver {
        /// The call.
        call: &'static str,
        /// What the driver said.
        cause: DriverError,
    },
    /// A buffer or stream that every device needs could not be made.
    #[error(transparent)]
    Opening(lora_core::Error),
}

fn list(paths: &[PathBuf]) -> String {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    names.join(", ")
}

/// Whether the driver found no memory.
pub(crate) fn is_full(cause: DriverError) -> bool {
    cause.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY
}

impl CudaError {
    /// An error of the driver in `call`.
    pub(crate) fn driver(call: &'static str) -> impl Fn(DriverError) -> Self {
        move |cause| {
            if is_full(cause) {
                Self::Full { what: call.to_owned() }
            } else {
                Self::Driver { call, cause }
            }
        }
    }
}

impl From<CudaError> for lora_core::Error {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::Opening(error) => error,
            error => Self::Device(error.to_string()),
        }
    }
}

/// An error of the driver in `call`, as the trait's.
pub(crate) fn failed(call: &'static str) -> impl Fn(DriverError) -> lora_core::Error {
    move |cause| CudaError::driver(call)(cause).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_says_what_to_do_or_what_was_found() {
        let library = CudaError::Library { library: "libcuda", remedy: "install the driver" };
        let device = CudaError::NoDevice { ordinal: 3, count: 2 };
        let searched = vec![PathBuf::from("a"), PathBuf::from("b")];
        let driver = |cause| CudaError::driver("cuStreamCreate")(DriverError(cause));
        let full = driver(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        // Its text is the driver's.
        let lost = driver(sys::CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE);
        assert!(matches!(lost, CudaError::Driver { call: "cuStreamCreate", .. }));
        let refused = lora_core::Error::Device("cuMemAlloc: refused".to_owned());
        let text = refused.to_string();
        assert_eq!(lora_core::Error::from(CudaError::Opening(refused)).to_string(), text);
        for (error, parts) in [
            (library, &["libcuda", "install the driver", "CPU"][..]),
            (device, &["device 3", "shows 2"]),
            (CudaError::NoKernels { searched }, &["a, b", "xtask kernels", "LORAMUX_KERNELS"]),
            (full, &["device is full", "cuStreamCreate", "end other programs", "CPU"]),
        ] {
            let text = lora_core::Error::from(error).to_string();
            for part in parts {
                assert!(text.contains(part), "{part} is not in: {text}");
            }
        }
    }
}
