//! Where a command reads and writes.

use std::io::{BufRead, Write};

/// The streams of a run: those of the process, or buffers in a test.
pub struct Streams<'a> {
    /// Requests, where `-` is given for a file.
    pub stdin: &'a mut dyn BufRead,
    /// Answers.
    pub stdout: &'a mut dyn Write,
    /// Everything else.
    pub stderr: &'a mut dyn Write,
    /// Whether a person watches standard error on a terminal, so that progress is drawn there.
    pub live: bool,
}
