//! `loramux convert`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lora_core::ExpertLayout;

use super::expert_layout::expert_layout;
use super::lora::{FILE_HELP, LoraConfigArgs};

const LONG_ABOUT: &str = "\
Writes an adapter in another format, or with its routed experts in another layout.

It is read under the same strict rules as for serving. What was written is read again and compared, \
update by update, before success is reported; a copy that differs anywhere is removed.

With --model, modules that are one in the file and several in the model are cut apart first. NeMo \
archives need it, as they order rows by the model's heads.";

const EXAMPLES: &str = "\
Examples:
  loramux convert my-adapter.nemo my-adapter --to peft --model my-model
  loramux convert my-adapter stacked --to stacked
  loramux convert my-adapter for-peft --to peft-target-parameters
  loramux convert my-adapter my-adapter.nemo --to nemo --model my-model
";

const EXIT_CODES: &str = "
It exits with 1 if the adapter is refused or the target cannot hold it, with 2 if a file cannot be
read or written.
Exit codes are listed by `loramux --help`.";

/// Write an adapter in another format or layout, and verify the copy
#[derive(Args)]
#[command(long_about = LONG_ABOUT, after_long_help = format!("{EXAMPLES}{FILE_HELP}{EXIT_CODES}"))]
pub(super) struct ConvertArgs {
    /// The adapter: a directory, or a .nemo archive
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Where to write: a directory, or a .nemo archive with --to nemo; nothing may be there yet
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// What to write
    #[arg(long, value_enum)]
    to: Target,
    /// Read it for this model: a folder or a .gguf file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    /// JSON file with fields of LoraConfig, such as {"nemo_qkv_layout": "concatenated"}
    #[arg(long, value_name = "FILE.json")]
    lora_config: Option<PathBuf>,
    /// Layout of the routed experts that are read [default: the one that the file shows]
    #[arg(long, value_name = "NAME", value_parser = expert_layout())]
    moe_layout: Option<ExpertLayout>,
}

/// What `loramux convert` writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Target {
    /// A PEFT directory; routed experts keep their layout, if PEFT directories have it
    Peft,
    /// A PEFT directory with routed experts as PEFT's target_parameters
    PeftTargetParameters,
    /// A PEFT directory with a stack of routed experts for each module
    Stacked,
    /// A PEFT directory with a pair of matrices for each routed expert
    PerExpert,
    /// A NeMo archive
    Nemo,
}

/// What `loramux convert` is to do.
#[derive(Clone, PartialEq, Debug)]
pub struct ConvertJob {
    /// The adapter.
    pub input: PathBuf,
    /// Where to write.
    pub output: PathBuf,
    /// What to write.
    pub to: Target,
    /// The model to read it for.
    pub model: Option<PathBuf>,
    /// How it is read.
    pub lora: LoraConfigArgs,
    /// Layout of the routed experts that are read.
    pub moe_layout: Option<ExpertLayout>,
}

impl ConvertArgs {
    pub fn into_job(self) -> ConvertJob {
        let Self { input, output, to, model, lora_config, moe_layout } = self;
        let lora = LoraConfigArgs::of_file(lora_config);
        ConvertJob { input, output, to, model, lora, moe_layout }
    }
}
