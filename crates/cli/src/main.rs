//! The program `polylora`: arguments and streams of the process, handed to [`cli::run`].

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use cli::Streams;
use tracing::Level;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_max_level(Level::WARN)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .init();
    let mut streams = Streams {
        stdin: &mut io::stdin().lock(),
        stdout: &mut io::stdout(),
        stderr: &mut io::stderr(),
        live: io::stderr().is_terminal(),
    };
    cli::run(std::env::args_os(), &mut streams).into()
}
