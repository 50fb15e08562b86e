//! Adapters in torch pickles and NeMo archives: they are what their safetensors twins are, and
//! whatever is wrong with them is refused by name.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod build;
mod damage;
mod nemo;
mod torch;
mod twins;
