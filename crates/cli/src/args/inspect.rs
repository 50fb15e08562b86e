//! `loramux inspect`.

use std::path::PathBuf;

use super::lora::{FILE_HELP, LoraConfigArgs};
use clap::Args;

const LONG_ABOUT: &str = "\
Describes and checks an adapter: the modules and layers that it changes, with rank and scale, and every rule that \
it breaks, with the value found, the values allowed and the remedy.

With --model, the adapter is also checked against the model's dimensions and module names, and against the \
target modules of --lora-config. A model that loramux cannot run, such as one quantised by GPTQ, is reported too. \
Only the model's configuration and tokenizer are read, and those weights that the adapter replaces, to compare them. \
The report also shows how the adapter's own tokenizer, chat template and end tokens differ from the model's.";

const EXAMPLES: &str = "\
Examples:
  loramux inspect my-adapter
  loramux inspect my-adapter --model my-model --max-lora-rank 16
  loramux inspect my-adapter --model my-model --lora-config lora.json
  loramux inspect my-adapter.nemo --model my-model
  loramux inspect my-adapter --json
";

const EXIT_CODES: &str = "
Exits with 1 if the adapter would be refused, so that scripts can check before serving it.
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
    /// Write the report as one JSON object
    #[arg(long)]
    json: bool,
}

/// The parsed arguments of `loramux inspect`.
#[derive(Clone, PartialEq, Debug)]
pub struct InspectJob {
    /// The adapter.
    pub path: PathBuf,
    /// The model to check against.
    pub model: Option<PathBuf>,
    /// Settings under which it would be served.
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
