//! JSON lines of requests, and their sampling parameters.

#![no_main]

use cli::requests::{Defaults, read_lines};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut reader = bytes;
    let lines = read_lines(&mut reader, &Defaults::default()).expect("memory can be read");
    for request in lines.iter().filter_map(|line| line.request.as_ref().ok()) {
        let _ = request.sampling.validate();
    }
});
