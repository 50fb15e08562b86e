//! The command line `loramux`: [`run`] is the whole program but for the process around it.
//!
//! [`args`] turns words into jobs, [`commands`] does them. [`requests`] reads JSON lines and
//! [`answers`] writes them, to an `output`; [`model_fetch`] gets the model of the demonstration.
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

/// Runs one command line, of which the first word is the name of the program.
///
/// Everything that a user sees goes through `streams`; what goes wrong is told there, too, and
/// summed up in the result.
pub fn run(words: impl IntoIterator<Item = OsString>, streams: &mut Streams<'_>) -> Exit {
    let (command, verbosity) = match args::parse(words) {
        Ok(parsed) => parsed,
        Err(refusal) => return tell_usage(&refusal, streams),
    };
    streams.quiet = verbosity.quiet;
    let done = logging::start(verbosity)
        .or_exit(Exit::Usage)
        .and_then(|()| commands::execute(&command, streams));
    done.unwrap_or_else(|failure| {
        // A reader that has what it wants, such as `head`, is no error that anybody reads about.
        if failure.exit != Exit::ClosedPipe {
            streams.tell(format_args!("error: {:#}", failure.error));
        }
        failure.exit
    })
}

/// Shows a refusal of the arguments, or the help that was asked for.
fn tell_usage(refusal: &clap::Error, streams: &mut Streams<'_>) -> Exit {
    let text = refusal.render();
    // As above: a closed stream leaves nobody to tell.
    if refusal.use_stderr() {
        let _ = write!(streams.stderr, "{text}");
        return Exit::Usage;
    }
    let _ = write!(streams.stdout, "{text}");
    Exit::Fine
}
