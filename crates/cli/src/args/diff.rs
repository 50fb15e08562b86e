//! `loramux diff`.

use std::path::PathBuf;

use clap::Args;

use super::lora::{FILE_HELP, LoraConfigArgs};

const LONG_ABOUT: &str = "\
Compares what two adapters change, whatever their formats and layouts: the updates scale * B A of \
every module and every routed expert are multiplied out and held against each other, and so is all \
else that the adapters have.

A module that only one of them changes counts as an update of zero in the other. A path that ends \
in .nemo, or a folder with such an archive and without adapter_config.json, is read as NeMo's.";

const EXAMPLES: &str = "\
Examples:
  loramux diff my-adapter my-copy
  loramux diff my-adapter.nemo my-adapter --model my-model
  loramux diff my-adapter retrained --tolerance 0.01 --json
";

const EXIT_CODES: &str = "
It exits with 0 if the adapters do the same, with 1 if they differ or one would be refused, with 2 if
one cannot be read.
Exit codes are listed by `loramux --help`.";

/// Compare what two adapters change
#[derive(Args)]
#[command(long_about = LONG_ABOUT, after_long_help = format!("{EXAMPLES}{FILE_HELP}{EXIT_CODES}"))]
pub(super) struct DiffArgs {
    /// An adapter
    #[arg(value_name = "A")]
    one: PathBuf,
    /// Another one
    #[arg(value_name = "B")]
    other: PathBuf,
    /// Read both for this model: a folder or a .gguf file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    /// JSON file with fields of LoraConfig, such as {"moe_layout": "fused-interleaved"}
    #[arg(long, value_name = "FILE.json")]
    lora_config: Option<PathBuf>,
    /// Differences up to this share of an update's largest element count as none
    #[arg(long, value_name = "X", default_value_t = 1e-6, value_parser = tolerance)]
    tolerance: f64,
    /// Write one JSON object
    #[arg(long)]
    json: bool,
}

fn tolerance(word: &str) -> Result<f64, String> {
    let number: f64 =
        word.parse().map_err(|_| "not a number; write one such as 1e-6".to_owned())?;
    if !number.is_finite() || number < 0.0 {
        return Err("out of range; write a number of at least 0, such as 1e-6".to_owned());
    }
    Ok(number)
}

/// What `loramux diff` is to do.
#[derive(Clone, PartialEq, Debug)]
pub struct DiffJob {
    /// The adapters.
    pub paths: [PathBuf; 2],
    /// The model to read them for.
    pub model: Option<PathBuf>,
    /// How they are read.
    pub lora: LoraConfigArgs,
    /// Largest relative difference that counts as none.
    pub tolerance: f64,
    /// Whether to write JSON.
    pub json: bool,
}

impl DiffArgs {
    pub fn into_job(self) -> DiffJob {
        let Self { one, other, model, lora_config, tolerance, json } = self;
        let lora = LoraConfigArgs::of_file(lora_config);
        DiffJob { paths: [one, other], model, lora, tolerance, json }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tolerance_is_a_share_of_at_least_nothing() {
        assert_eq!((tolerance("0"), tolerance("1e-3")), (Ok(0.0), Ok(1e-3)));
        for bad in ["-1", "nan", "inf", "x", ""] {
            assert!(tolerance(bad).is_err(), "{bad}");
        }
    }
}
