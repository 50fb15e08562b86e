//! Fuzzes NeMo archives, plain or compressed.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use lora_core::formats::{ReadOptions, Source, nemo};

fuzz_target!(|bytes: &[u8]| {
    let source = Source::in_memory(Path::new("fuzz.nemo"), bytes.to_vec());
    let _ = nemo::read_archive(&source, &ReadOptions::default());
});
