//! The compiled kernels: their sources and version, the fatbins of this crate, and the libraries beside them.

pub mod cublaslt;
pub mod flashinfer;
pub mod functions;
pub mod kernels;
pub mod modules;
pub mod requirements;
