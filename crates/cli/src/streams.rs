//! The input and output streams of a command.

use std::fmt::Display;
use std::fs::File;
use std::io::{BufRead, Write};

/// The streams of a run: those of the process, or buffers in a test.
pub struct Streams<'a> {
    /// Requests, if `-` is given for a file; read on a background thread.
    pub stdin: Box<dyn BufRead + Send>,
    /// Answers.
    pub stdout: &'a mut dyn Write,
    /// Standard output, if it is a regular file, so that a partial line can be truncated.
    pub stdout_file: Option<File>,
    /// Messages and progress.
    pub stderr: &'a mut dyn Write,
    /// Whether standard error is a terminal, so that progress is drawn there.
    pub live: bool,
    /// Whether only errors are printed; set by `--quiet`.
    pub quiet: bool,
}

impl Streams<'_> {
    /// Prints a line that is no error on standard error, unless `quiet`.
    pub(crate) fn note(&mut self, line: impl Display) {
        if !self.quiet {
            self.print(line);
        }
    }

    /// Prints a line on standard error. A failure is ignored, as a closed stream leaves nowhere to report it.
    pub(crate) fn print(&mut self, line: impl Display) {
        let _ = writeln!(self.stderr, "{line}");
    }
}
