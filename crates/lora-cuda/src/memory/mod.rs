//! Memory of the device and of the host beside it, and the streams that fill it.

pub mod buffer;
pub mod copies;
pub mod download;
pub mod queue;
