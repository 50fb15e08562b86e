//! Fuzzes torch files, and reads every tensor found in them.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use lora_core::formats::{Source, torch};

fuzz_target!(|bytes: &[u8]| {
    let source = Source::in_memory(Path::new("fuzz.bin"), bytes.to_vec());
    if let Ok(raw) = torch::parse(&source) {
        for tensor in raw.tensors.values() {
            tensor.read().expect("a tensor that was found lies inside the file");
        }
    }
});
