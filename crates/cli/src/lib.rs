//! The `loramux` command line as a library, so that tests can run it in-process by [`run`].
//!
//! [`args`] parses the command line into jobs, which [`commands`] runs. [`requests`] reads JSON lines, [`answers`]
//! formats them and `output` writes them; [`model_fetch`] downloads the model of `loramux demo`.
#![warn(missing_docs)]

mod adapters;
pub mod answers;
pub mod args;
pub mod commands;
mod exit;
mod flags;
mod logging;
mod meter;
pub mod model_fetch;
mod model_geometry;
mod output;
mod progress;
pub mod requests;
mod sampling_defaults;
mod settings;
mod signals;
mod startup;
mod streams;
mod table;

use std::ffi::OsString;

use exit::OrExit;
pub use exit::{Exit, Failure};
pub use streams::Streams;

/// Runs one command line, whose first word is the name of the program.
///
/// All output, error messages included, goes to `streams`; the result is the exit code.
pub fn run(words: impl IntoIterator<Item = OsString>, streams: &mut Streams<'_>) -> Exit {
    let (command, verbosity) = match args::parse(words) {
        Ok(parsed) => parsed,
        Err(refusal) => return print_usage(&refusal, streams),
    };
    streams.quiet = verbosity.quiet;
    let done = logging::start(verbosity)
        .or_exit(Exit::Usage)
        .and_then(|()| commands::execute(&command, streams));
    done.unwrap_or_else(|failure| {
        // A closed pipe is how readers such as `head` say that they have enough; it needs no message.
        if failure.exit != Exit::ClosedPipe {
            streams.print(format_args!("error: {:#}", failure.error));
        }
        failure.exit
    })
}

/// Prints an error about the arguments, or the help.
fn print_usage(refusal: &clap::Error, streams: &mut Streams<'_>) -> Exit {
    let text = refusal.render();
    // A failure is ignored, as a closed stream leaves nowhere to report it.
    if refusal.use_stderr() {
        let _ = write!(streams.stderr, "{text}");
        return Exit::Usage;
    }
    let _ = write!(streams.stdout, "{text}");
    Exit::Fine
}
