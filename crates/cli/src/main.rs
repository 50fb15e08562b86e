//! The program `loramux`: hands the process's arguments and streams to [`loramux::run`].

use std::fs::File;
use std::io::{self, BufReader, IsTerminal};
use std::os::fd::AsFd;
use std::process::ExitCode;

use loramux::Streams;

fn main() -> ExitCode {
    let mut streams = Streams {
        stdin: Box::new(BufReader::new(io::stdin())),
        stdout: &mut io::stdout(),
        stdout_file: regular_stdout(),
        stderr: &mut io::stderr(),
        live: io::stderr().is_terminal(),
        quiet: false,
    };
    loramux::run(std::env::args_os(), &mut streams).into()
}

/// Standard output, if it is a regular file.
fn regular_stdout() -> Option<File> {
    let file = File::from(io::stdout().as_fd().try_clone_to_owned().ok()?);
    file.metadata().ok()?.is_file().then_some(file)
}
