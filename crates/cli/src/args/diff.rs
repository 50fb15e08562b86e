//! `loramux diff`.

use std::path::PathBuf;

use clap::Args;

use super::lora::{FILE_HELP, LoraConfigArgs};

const LONG_ABOUT: &str = "\
Compares the effect of two adapters, whatever their formats and layouts: the updates scale * B A of every module \
and every routed expert are multiplied out and compared, as is everything else that an adapter can hold.

A module that only one of them changes counts as a zero update in the other. A path that ends in .nemo, or a \
folder with such an archive and without adapter_config.json, is read as a NeMo adapter.";

const EXAMPLES: &str = "\
Examples:
  loramux diff my-adapter my-copy
  loramux diff my-adapter.nemo my-adapter --model my-model
  loramux diff my-adapter retrained --tolerance 0.01 --json
";

const EXIT_CODES: &str = "
Exits with 0 if the adapters have the same effect, with 1 if they differ or one would be refused, and
with 2 if one cannot be read.
Exit codes are listed by `loramux --help`.";

/// Compare the effect of two adapters
#[derive(Args)]
#[command(long_about = LONG_ABOUT, after_long_help = format!("{EXAMPLES}{FILE_HELP}{EXIT_CODES}"))]
pub(super) struct DiffArgs {
    /// The first adapter
    #[arg(value_name = "A")]
    one: PathBuf,
    /// The second adapter
    #[arg(value_name = "B")]
    other: PathBuf,
    /// The model that both are for: a folder or a .gguf file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    /// JSON file with fields of LoraConfig, such as {"moe_layout": "fused-interleaved"}
    #[arg(long, value_name = "FILE.json")]
    lora_config: Option<PathBuf>,
    /// Largest difference to ignore, as a fraction of an update's largest element
    #[arg(long, value_name = "X", default_value_t = 1e-6, value_parser = tolerance)]
    tolerance: f64,
    /// Write the report as one JSON object
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

/// The parsed arguments of `loramux diff`.
#[derive(Clone, PartialEq, Debug)]
pub struct DiffJob {
    /// The two adapters.
    pub paths: [PathBuf; 2],
    /// The model that both are for.
    pub model: Option<PathBuf>,
    /// Settings for reading them.
    pub lora: LoraConfigArgs,
    /// Largest relative difference to ignore.
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
    fn a_tolerance_is_a_finite_number_of_at_least_zero() {
        assert_eq!((tolerance("0"), tolerance("1e-3")), (Ok(0.0), Ok(1e-3)));
        for bad in ["-1", "nan", "inf", "x", ""] {
            assert!(tolerance(bad).is_err(), "{bad}");
        }
    }
}
