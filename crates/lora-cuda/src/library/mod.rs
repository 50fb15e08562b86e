//! The compiled kernels: their sources and version, the fatbins of this crate, and FlashInfer's library.

pub mod flashinfer;
pub mod kernels;
pub mod modules;
