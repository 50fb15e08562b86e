//! `loramux convert`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lora_core::ExpertLayout;

use super::expert_layout::expert_layout;
use super::lora::{FILE_HELP, LoraConfigArgs};

const LONG_ABOUT: &str = "\
Writes an adapter in another format, or with its routed experts in another layout.

The adapter is read under the same strict rules as for serving. The copy is read back and compared with it, \
update by update; if anything differs, the copy is removed and the command fails.

With --model, fused modules of the file, such as qkv_proj, are split into the modules of the model. NeMo archives \
need a model, because their rows are ordered by its attention heads.";

const EXAMPLES: &str = "\
Examples:
  loramux convert my-adapter.nemo my-adapter --to peft --model my-model
  loramux convert my-adapter stacked --to stacked
  loramux convert my-adapter for-peft --to peft-target-parameters
  loramux convert my-adapter my-adapter.nemo --to nemo --model my-model
";

const EXIT_CODES: &str = "
Exits with 1 if the adapter is refused or the target format cannot hold it, and with 2 if a file cannot
be read or written.
Exit codes are listed by `loramux --help`.";

/// Write an adapter in another format or layout and verify the copy
#[derive(Args)]
#[command(long_about = LONG_ABOUT, after_long_help = format!("{EXAMPLES}{FILE_HELP}{EXIT_CODES}"))]
pub(super) struct ConvertArgs {
    /// The adapter: a directory, or a .nemo archive
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Where to write: a directory, or a .nemo archive with --to nemo; must not exist yet
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Format to write
    #[arg(long, value_enum)]
    to: Target,
    /// The model that the adapter is for: a folder or a .gguf file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    /// JSON file with fields of LoraConfig, such as {"nemo_qkv_layout": "concatenated"}
    #[arg(long, value_name = "FILE.json")]
    lora_config: Option<PathBuf>,
    /// Layout of the routed experts in the input [default: detected from the file]
    #[arg(long, value_name = "NAME", value_parser = expert_layout())]
    moe_layout: Option<ExpertLayout>,
}

/// A format that `loramux convert` writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Target {
    /// A PEFT directory; routed experts keep their layout if PEFT has it, else per-expert
    Peft,
    /// A PEFT directory with routed experts as PEFT's target_parameters
    PeftTargetParameters,
    /// A PEFT directory with the routed experts of each module stacked into one tensor
    Stacked,
    /// A PEFT directory with a pair of matrices for each routed expert
    PerExpert,
    /// A NeMo archive
    Nemo,
}

/// The parsed arguments of `loramux convert`.
#[derive(Clone, PartialEq, Debug)]
pub struct ConvertJob {
    /// The adapter.
    pub input: PathBuf,
    /// Where to write.
    pub output: PathBuf,
    /// Format to write.
    pub to: Target,
    /// The model that the adapter is for.
    pub model: Option<PathBuf>,
    /// Settings for reading the adapter.
    pub lora: LoraConfigArgs,
    /// Layout of the routed experts in the input; `None`: detected.
    pub moe_layout: Option<ExpertLayout>,
}

impl ConvertArgs {
    pub fn into_job(self) -> ConvertJob {
        let Self { input, output, to, model, lora_config, moe_layout } = self;
        let lora = LoraConfigArgs::of_file(lora_config);
        ConvertJob { input, output, to, model, lora, moe_layout }
    }
}
