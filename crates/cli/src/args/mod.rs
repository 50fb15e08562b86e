//! The command line: clap's argument structs, and the jobs that they are turned into.
//!
//! A job is fully checked, so that [`crate::commands`] need not know about flags.

mod adapter;
mod convert;
mod demo;
mod diff;
mod engine;
mod expert_layout;
mod flag_file;
mod generate;
mod inspect;
mod lora;
mod number;
mod sampling;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand};

pub use convert::{ConvertJob, Target};
pub use demo::DemoJob;
pub use diff::DiffJob;
pub use engine::{ComputeArgs, Device, EngineArgs};
pub use generate::{GenerateJob, SamplingDefaults, Sink, Source};
pub use inspect::InspectJob;
pub use lora::LoraConfigArgs;

use convert::ConvertArgs;
use demo::DemoArgs;
use diff::DiffArgs;
use generate::GenerateArgs;
use inspect::InspectArgs;

const LONG_ABOUT: &str = "\
Serves many LoRA adapters on one base model, all in the same batch.

An adapter that cannot be applied exactly as it was trained is refused, with the rule that it breaks and the \
remedy; it is never applied in part.";

const AFTER_HELP: &str = "\
Examples:
  loramux demo
  loramux inspect my-adapter --model my-model
  loramux convert my-adapter.nemo my-adapter --to peft --model my-model
  loramux diff my-adapter my-copy
  loramux generate --model my-model --adapter sql=my-adapter --lora sql --chat 'How many books?'

An argument @FILE is replaced by the arguments in FILE, quoted as in a shell, on any number of lines; lines that \
start with # are skipped. The value of a flag may start with @ and is not replaced.

RUST_LOG overrides -v and -q for single crates, as in RUST_LOG=loramux_engine=debug,warn.

Exit codes:
  0    success
  1    an adapter would be refused, adapters differ, or at least one request failed
  2    the command line is wrong, or names a file that cannot be read or written
  3    the model cannot be downloaded or loaded
  130  SIGINT ended a batch; finished answers are written
  141  the reader of the output closed it
  143  SIGTERM ended a batch; finished answers are written";

#[derive(Parser)]
#[command(name = "loramux", version, about = "Many LoRA adapters on one base model")]
#[command(long_about = LONG_ABOUT, after_long_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    verbosity: VerbosityArgs,
    #[command(subcommand)]
    command: CommandArgs,
}

#[derive(Args)]
struct VerbosityArgs {
    /// Log more; repeatable
    #[arg(short, long, action = ArgAction::Count, global = true, help_heading = "Messages")]
    verbose: u8,
    /// Print only errors
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Messages")]
    quiet: bool,
}

/// How much is printed on standard error.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Verbosity {
    /// Number of `-v` flags.
    pub verbose: u8,
    /// Whether only errors are printed.
    pub quiet: bool,
}

#[derive(Subcommand)]
enum CommandArgs {
    Convert(ConvertArgs),
    Demo(DemoArgs),
    Diff(DiffArgs),
    Generate(Box<GenerateArgs>),
    Inspect(InspectArgs),
}

/// A parsed command line.
#[derive(Clone, PartialEq, Debug)]
pub enum Command {
    /// Write an adapter in another format or layout and verify the copy.
    Convert(ConvertJob),
    /// Compare answers of several adapters.
    Demo(DemoJob),
    /// Compare two adapters.
    Diff(DiffJob),
    /// Answer prompts.
    Generate(Box<GenerateJob>),
    /// Describe and check an adapter.
    Inspect(InspectJob),
}

/// Parses a command line, whose first word is the name of the program, and the flag files that it names.
///
/// # Errors
/// Whatever clap refuses; flag files and adapter folders that cannot be read; malformed or repeated adapters; flags
/// that contradict each other. As in clap, `--help` is an error whose text is the help.
pub fn parse(
    words: impl IntoIterator<Item = OsString>,
) -> Result<(Command, Verbosity), clap::Error> {
    let words = flag_file::expand(words, &Cli::command())?;
    let Cli { command, verbosity: VerbosityArgs { verbose, quiet } } = Cli::try_parse_from(words)?;
    let command = match command {
        CommandArgs::Convert(args) => Command::Convert(args.into_job()),
        CommandArgs::Diff(args) => Command::Diff(args.into_job()),
        CommandArgs::Demo(args) => Command::Demo(args.into_job()),
        CommandArgs::Generate(args) => Command::Generate(Box::new(args.into_job()?)),
        CommandArgs::Inspect(args) => Command::Inspect(args.into_job()),
    };
    Ok((command, Verbosity { verbose, quiet }))
}

/// An error about flags that clap accepts, shown with the usage of the command.
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

    /// Every line of a help text that shows the program being called.
    fn examples(help: &str) -> Vec<String> {
        let lines = help.lines().map(str::trim).filter(|line| line.starts_with("loramux "));
        lines.map(str::to_owned).collect()
    }

    #[test]
    fn every_example_of_every_help_is_a_command_line() {
        let mut cli = Cli::command().term_width(1000);
        let mut lines = examples(&cli.render_long_help().to_string());
        for command in cli.get_subcommands_mut() {
            lines.extend(examples(&command.render_long_help().to_string()));
        }
        assert!(lines.len() > 15, "{lines:?}");
        for line in lines {
            let words = shlex::split(&line).unwrap();
            let parsed = parse(words.into_iter().map(Into::into));
            assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
        }
    }

    #[test]
    fn messages_are_more_or_fewer_wherever_the_flag_stands() {
        let verbosity = |line: &str| {
            let words = shlex::split(line).unwrap();
            parse(words.into_iter().map(Into::into)).map(|(_, verbosity)| verbosity)
        };
        let expected = Verbosity { verbose: 2, quiet: false };
        assert_eq!(verbosity("loramux inspect x -vv").unwrap_or_default(), expected);
        assert!(verbosity("loramux inspect x -q").unwrap_or_default().quiet);
        assert!(verbosity("loramux inspect x -q -v").is_err());
    }

    #[test]
    fn every_command_teaches_by_example_and_names_the_exit_codes() {
        let mut cli = Cli::command();
        assert!(cli.render_long_help().to_string().contains("Exit codes"));
        for command in cli.get_subcommands_mut().filter(|command| command.get_name() != "help") {
            let help = command.render_long_help().to_string();
            assert!(help.contains("Examples:\n  loramux "), "{help}");
            assert!(help.contains("Exit codes are listed by `loramux --help`."), "{help}");
        }
    }
}
