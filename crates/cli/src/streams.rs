//! Where a command reads and writes.

use std::fmt::Display;
use std::fs::File;
use std::io::{BufRead, Write};

/// The streams of a run: those of the process, or buffers in a test.
pub struct Streams<'a> {
    /// Requests, where `-` is given for a file. A thread of its own reads them while others run.
    pub stdin: Box<dyn BufRead + Send>,
    /// Answers.
    pub stdout: &'a mut dyn Write,
    /// Standard output, if that is a regular file: what is written there can be taken back.
    pub stdout_file: Option<File>,
    /// Everything else.
    pub stderr: &'a mut dyn Write,
    /// Whether a person watches standard error on a terminal, so that progress is drawn there.
    pub live: bool,
    /// Whether only errors are told; set by `--quiet`.
    pub quiet: bool,
}

impl Streams<'_> {
    /// Tells something that is no error, in one line on standard error, unless `quiet`.
    pub(crate) fn note(&mut self, line: impl Display) {
        if !self.quiet {
            self.tell(line);
        }
    }

    /// Writes a line to standard error. Nobody is left to be told if that is closed.
    pub(crate) fn tell(&mut self, line: impl Display) {
        let _ = writeln!(self.stderr, "{line}");
    }
}
