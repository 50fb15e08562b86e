//! The ops, as plain loops in the order of their formulas.

pub mod activation;
pub mod attention;
pub mod embed;
pub mod linear;
pub mod logprobs;
pub mod lora;
pub mod lora_plan;
pub mod norm;
pub mod rope;
pub mod sample;
