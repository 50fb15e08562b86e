//! `config.json` of a model, and the dimensions made of it.

#![no_main]

use std::path::Path;

use loramux_engine::model::ModelConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|json: &[u8]| {
    if let Ok(config) = ModelConfig::from_json(Path::new("config.json"), json) {
        loramux_engine::geometry(&config).modules();
    }
});
