//! `loramux inspect`.

use std::path::PathBuf;

use super::lora::{FILE_HELP, LoraConfigArgs};
use clap::Args;

const LONG_ABOUT: &str = "\
Describes an adapter and checks it: which modules of which layers it changes, at what rank and \
scale, and every rule that it breaks, each with what was found, what is allowed and what to do.

With --model it is read for that model and held against its dimensions and module names, and \
against the target modules of --lora-config. A model that would not be run is refused as well, such as \
one that is quantised by GPTQ. Of the model the configuration and the tokenizer are read, and those weights \
that the adapter holds whole, to compare them. What differs of tokenizer, chat template and end tokens beside the adapter is told.";

const EXAMPLES: &str = "\
Examples:
  loramux inspect my-adapter
  loramux inspect my-adapter --model my-model --max-lora-rank 16
  loramux inspect my-adapter --model my-model --lora-config lora.json
  loramux inspect my-adapter.nemo --model my-model
  loramux inspect my-adapter --json
";

const EXIT_CODES: &str = "
It exits with 1 if the adapter would be refused, so that scripts can ask before they serve it.
Exit codes are listed by `loramux --help`.";

/// Describe an adapter and check whether it would be served
#[derive(Args)]
#[command(long_about = LONG_ABOUT, after_long_help = format!("{EXAMPLES}{FILE_HELP}{EXIT_CODES}"))]
pub(super) struct InspectArgs {
    /// The adapter: a directory, or a .nemo archive
    path: PathBuf,
    /// Check against this model: a folder or a .gguf file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    #[command(flatten)]
    lora: LoraConfigArgs,
    /// Write one JSON object
    #[arg(long)]
    json: bool,
}

/// What `loramux inspect` is to do.
#[derive(Clone, PartialEq, Debug)]
pub struct InspectJob {
    /// The adapter.
    pub path: PathBuf,
    /// Its format.
    /// The model to check against.
    pub model: Option<PathBuf>,
    /// How it would be served.
    pub lora: LoraConfigArgs,
    /// Whether to write JSON.
    pub json: bool,
}

impl InspectArgs {
    pub fn into_job(self) -> InspectJob {
        let Self { path, model, lora, json } = self;
        InspectJob { path, model, lora, json }
    }
}
