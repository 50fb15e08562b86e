//! Fuzzes a model's `config.json`, and the dimensions computed from it.

#![no_main]

use std::path::Path;

use loramux_engine::model::ModelConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|json: &[u8]| {
    if let Ok(config) = ModelConfig::from_json(Path::new("config.json"), json) {
        loramux_engine::geometry(&config).modules();
    }
});
