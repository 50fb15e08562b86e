//! Fuzzes `adapter_config.json`, with the tensors of a small adapter.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use lora_core::formats::{ReadOptions, Source, peft, safetensors};

/// LoRA of rank 2 on `q_proj` of one layer with 2 inputs and 2 outputs.
const WEIGHTS: &[u8] = include_bytes!("q_proj.safetensors");

fuzz_target!(|config: &[u8]| {
    let path = Path::new("fuzz");
    let weights = Source::in_memory(path, WEIGHTS);
    let tensors = safetensors::parse(&weights).expect("the weights are well formed");
    let _ = peft::read_parts(path, config, tensors, &ReadOptions::default());
});
