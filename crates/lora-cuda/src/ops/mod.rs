//! The ops: checks, the choice of a kernel, and its launch.

pub mod attention;
pub mod common;
pub mod linear;
pub mod logprobs;
pub mod lora;
pub mod norm;
pub mod rope;
pub mod rows;
pub mod sample;
