//! Fuzzes request lines and their sampling parameters.

#![no_main]

use loramux::requests::{Defaults, Line, RawLine};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let defaults = Defaults::default();
    for (number, bytes) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let line = Line::read(&RawLine { number, bytes: Some(bytes.to_vec()) }, &defaults);
        if let Ok(request) = &line.request {
            let _ = request.sampling.validate();
        }
    }
});
