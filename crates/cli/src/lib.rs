//! The command line `polylora`: [`run`] is the whole program but for the process around it.
//!
//! [`args`] turns words into jobs, [`commands`] does them. [`requests`] reads JSON lines and
//! [`answers`] writes them; [`model_fetch`] gets the model of the demonstration.
#![warn(missing_docs)]

pub mod answers;
pub mod args;
pub mod commands;
mod exit;
mod flags;
mod lora_file;
mod meter;
pub mod model_fetch;
mod model_geometry;
mod progress;
pub mod requests;
mod startup;
mod streams;
mod table;

use std::ffi::OsString;

pub use exit::{Exit, Failure};
pub use streams::Streams;

/// Runs one command line, of which the first word is the name of the program.
///
/// Everything that a user sees goes through `streams`; what goes wrong is told there, too, and
/// summed up in the result.
pub fn run(words: impl IntoIterator<Item = OsString>, streams: &mut Streams<'_>) -> Exit {
    let command = match args::parse(words) {
        Ok(command) => command,
        Err(refusal) => return tell_usage(&refusal, streams),
    };
    match commands::execute(&command, streams) {
        Ok(exit) => exit,
        Err(failure) => {
            // Nobody is left to be told if standard error is closed.
            let _ = writeln!(streams.stderr, "error: {:#}", failure.error);
            failure.exit
        }
    }
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
