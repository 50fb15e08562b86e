//! The [`lora_core::Backend`] for CPUs, and the reference for other backends.
//!
//! Ops are plain loops in the order of their formulas, in `ops/`. Only inner products are optimised:
//! [`inner`] has a straightforward and a fast implementation, which are tested against each other. Results
//! are deterministic, and those of a row do not depend on the other rows of its batch, in any dtype.
//!
//! A backend computes on tensors in its own memory:
//!
//! ```
//! use lora_core::{Backend, DType, Pool, Tensor};
//! use lora_cpu_ref::CpuRef;
//!
//! # fn main() -> lora_core::Result<()> {
//! let be = CpuRef::with_threads(Some(1))?;
//! let mut queue = be.queue()?;
//! let (gate, up) = ([1.0f32, -1.0], [2.0f32, 3.0]);
//! let mut both = Tensor::zeros(&be, Pool::Activations, 1, 4, DType::F32)?;
//! let mut out = Tensor::zeros(&be, Pool::Activations, 1, 2, DType::F32)?;
//! be.upload(&mut queue, bytemuck::cast_slice(&[gate, up].concat()), both.view_mut())?;
//! be.silu_mul(&mut queue, both.view(), out.view_mut())?;
//! let download = be.download(&mut queue, out.view())?;
//! let values: Vec<f32> = bytemuck::pod_collect_to_vec(&be.wait(download)?);
//! assert!((values[0] - 2.0 / (1.0 + (-1.0f32).exp())).abs() < 1e-6);
//! # Ok(())
//! # }
//! ```
#![warn(missing_docs)]

mod backend;
mod buffer;
mod comm;
pub mod inner;
mod memory;
mod ops;
mod philox;
mod rows;

pub use backend::CpuRef;
pub use buffer::CpuBuf;
pub use comm::ThreadComm;
pub use ops::linear::CpuLinear;
pub use ops::lora::CpuLoraTable;
pub use ops::lora_plan::CpuLoraPlan;

/// Name of the backend in messages.
const NAME: &str = "cpu";

type View<'a> = lora_core::View<'a, CpuRef>;
type ViewMut<'a> = lora_core::ViewMut<'a, CpuRef>;
