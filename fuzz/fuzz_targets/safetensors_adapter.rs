//! Fuzzes safetensors files, as the weights of an adapter whose configuration allows every kind of LoRA.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use lora_core::formats::{ReadOptions, Source, peft, safetensors};

const CONFIG: &[u8] = br#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ".*",
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "peft_version": "0.19.1"}"#;

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("fuzz.safetensors");
    if let Ok(tensors) = safetensors::parse(&Source::in_memory(path, bytes.to_vec())) {
        let _ = peft::read_parts(path, CONFIG, tensors, &ReadOptions::default());
    }
});
