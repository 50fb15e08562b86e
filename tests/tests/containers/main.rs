//! Adapters in torch pickles and NeMo archives equal their safetensors versions, and damaged ones are
//! refused with specific errors.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod build;
mod damage;
mod nemo;
mod torch;
mod twins;
