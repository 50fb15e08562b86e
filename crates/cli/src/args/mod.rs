//! The arguments: what clap reads, and the jobs that are made of it.

mod adapter;
mod convert;
mod demo;
mod diff;
mod engine;
mod expert_layout;
mod generate;
mod inspect;
mod lora;
mod sampling;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

pub use convert::{ConvertJob, Target};
pub use demo::DemoJob;
pub use diff::DiffJob;
pub use engine::{Device, EngineSettings};
pub use generate::{GenerateJob, Sink, Source};
pub use inspect::InspectJob;
pub use lora::LoraSettings;

use convert::ConvertArgs;
use demo::DemoArgs;
use diff::DiffArgs;
use generate::GenerateArgs;
use inspect::InspectArgs;

const LONG_ABOUT: &str = "\
Serves many LoRA adapters on one base model, all in the same batch.

An adapter that cannot be applied exactly as it was trained is refused, with the rule that it \
breaks and what to do about it; it is never applied in part.";

const AFTER_HELP: &str = "\
Examples:
  polylora demo
  polylora inspect my-adapter --model my-model
  polylora convert my-adapter.nemo my-adapter --from nemo --to peft --model my-model
  polylora diff my-adapter my-copy
  polylora generate --model my-model --adapter sql=my-adapter --lora sql --chat 'How many books?'

Exit codes:
  0  all went well
  1  an adapter would be refused, adapters differ, or at least one request failed
  2  the command line is wrong, or names a file that cannot be read or written
  3  the model cannot be had or loaded";

#[derive(Parser)]
#[command(name = "polylora", version, about = "Many LoRA adapters on one base model")]
#[command(long_about = LONG_ABOUT, after_long_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: CommandArgs,
}

#[derive(Subcommand)]
enum CommandArgs {
    Convert(ConvertArgs),
    Demo(DemoArgs),
    Diff(DiffArgs),
    Generate(Box<GenerateArgs>),
    Inspect(InspectArgs),
}

/// What a command line asks for.
#[derive(Clone, PartialEq, Debug)]
pub enum Command {
    /// Write an adapter in another format or layout.
    Convert(ConvertJob),
    /// Show what adapters do.
    Demo(DemoJob),
    /// Compare two adapters.
    Diff(DiffJob),
    /// Answer prompts.
    Generate(Box<GenerateJob>),
    /// Describe and check an adapter.
    Inspect(InspectJob),
}

/// Reads a command line, of which the first word is the name of the program.
///
/// # Errors
/// What clap refuses, and what it cannot know: malformed or repeated adapters, flags that make no
/// sense together. A request for help is an error, too, whose text is the help.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Command, clap::Error> {
    match Cli::try_parse_from(words)?.command {
        CommandArgs::Convert(args) => Ok(Command::Convert(args.into_job())),
        CommandArgs::Diff(args) => Ok(Command::Diff(args.into_job())),
        CommandArgs::Demo(args) => Ok(Command::Demo(args.into_job())),
        CommandArgs::Generate(args) => Ok(Command::Generate(Box::new(args.into_job()?))),
        CommandArgs::Inspect(args) => Ok(Command::Inspect(args.into_job())),
    }
}

/// A refusal of flags that clap found well formed, with the usage of the command.
fn refuse(command: &str, message: impl std::fmt::Display) -> clap::Error {
    let mut cli = Cli::command();
    cli.build();
    let command = cli.find_subcommand_mut(command).cloned().unwrap_or(cli);
    clap::Error::raw(ErrorKind::ValueValidation, format!("{message}\n")).with_cmd(&command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_teaches_by_example_and_names_the_exit_codes() {
        let mut cli = Cli::command();
        assert!(cli.render_long_help().to_string().contains("Exit codes"));
        for command in cli.get_subcommands_mut().filter(|command| command.get_name() != "help") {
            let help = command.render_long_help().to_string();
            assert!(help.contains("Examples:\n  polylora "), "{help}");
            assert!(help.contains("Exit codes are listed by `polylora --help`."), "{help}");
        }
    }
}
