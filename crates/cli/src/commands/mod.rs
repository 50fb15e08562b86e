//! The commands, one module each.

mod adapter_text;
mod batch;
mod convert;
mod demo;
mod diff;
mod generate;
mod inspect;
mod report;
mod sites;

use crate::args::Command;
use crate::exit::{Exit, Failure};
use crate::streams::Streams;

/// Runs `command`.
///
/// # Errors
/// A failure that ends the whole run; a single request that fails gets an answer with its error instead.
pub fn execute(command: &Command, streams: &mut Streams<'_>) -> Result<Exit, Failure> {
    match command {
        Command::Convert(job) => convert::run(job, streams),
        Command::Diff(job) => diff::run(job, streams),
        Command::Demo(job) => demo::run(job, streams),
        Command::Generate(job) => generate::run(job, streams),
        Command::Inspect(job) => inspect::run(job, streams),
    }
}
