//! What a device must do, and the values that go to it: the seam between an engine and its backends.

mod backend;
pub mod check;
mod comm;
mod dtype;
mod error;
pub mod fp8;
mod host;
pub mod lora;
pub mod ops;
mod tensor;

pub use backend::{Backend, Caps, Pool};
pub use comm::{Comm, OneRank};
pub use dtype::DType;
pub use error::{Error, Result, check_extent, free_bytes};
pub use host::HostTensor;
pub use tensor::{MatLayout, Tensor, View, ViewMut};
