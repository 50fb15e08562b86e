//! Error texts for quantised checkpoints that the engine cannot read.

use std::path::Path;

use serde_json::Value;

use crate::model::ModelError;

/// Files in which older tools stored the quantisation settings, before these moved to `config.json`.
const SIDE_FILES: [(&str, &str); 2] =
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq")];

/// Longest name of a method that an error shows.
const MAX_NAME: usize = 40;

/// The error for a `quantization_config` of another method than ModelOpt's.
pub(in crate::model) fn refused(dir: &Path, config: &Value) -> ModelError {
    let method = config.get("quant_method").and_then(Value::as_str).unwrap_or("no quant_method");
    let method: String = method.chars().take(MAX_NAME).collect();
    let details = details(&method, config);
    let format = if details.is_empty() { method } else { format!("{method} ({details})") };
    ModelError::Quantized { path: dir.to_owned(), format }
}

/// Refuses a folder with a quantisation file of an older tool, even if `config.json` says nothing.
///
/// # Errors
/// [`ModelError::Quantized`].
pub(in crate::model) fn refuse_side_files(dir: &Path) -> Result<(), ModelError> {
    match SIDE_FILES.iter().find(|(file, _)| dir.join(file).is_file()) {
        Some((file, method)) => Err(ModelError::Quantized {
            path: dir.to_owned(),
            format: format!("{method} (it has {file})"),
        }),
        None => Ok(()),
    }
}

/// Bits, group size and block size, as far as the configuration states them.
fn details(method: &str, config: &Value) -> String {
    let number = |name: &str| config.get(name).and_then(Value::as_u64);
    let is_set = |name: &str| config.get(name) == Some(&Value::Bool(true));
    let bits = number("bits").map(|bits| format!("{bits} bits"));
    let parts = match method {
        "bitsandbytes" if is_set("load_in_4bit") => vec![Some("4 bits".to_owned())],
        "bitsandbytes" => vec![is_set("load_in_8bit").then(|| "8 bits".to_owned())],
        "fp8" => vec![blocks(config)],
        "compressed-tensors" => vec![strategy(config)],
        _ => vec![bits, number("group_size").map(|size| format!("groups of {size}"))],
    };
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// `weight_block_size` of FP8 checkpoints.
fn blocks(config: &Value) -> Option<String> {
    let size = config.get("weight_block_size")?.as_array()?;
    let size: Vec<String> = size.iter().take(2).map(Value::to_string).collect();
    Some(format!("a scale for each block of {} weights, not for a tensor", size.join(" x ")))
}

/// Bit width and granularity of the first group of a compressed-tensors configuration.
fn strategy(config: &Value) -> Option<String> {
    let (_, group) = config.get("config_groups")?.as_object()?.iter().next()?;
    let weights = group.get("weights")?;
    let text = |name: &str| weights.get(name).and_then(Value::as_str);
    let (kind, strategy) = (text("type")?, text("strategy")?);
    Some(format!("{kind} of {} bits by {strategy}", weights.get("num_bits")?.as_u64()?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn methods_are_described() {
        let group = json!({"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}});
        for (config, words) in [
            (
                json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
                "bitsandbytes (4 bits)",
            ),
            (json!({"quant_method": "bitsandbytes"}), "bitsandbytes"),
            (
                json!({"quant_method": "gptq", "bits": 4, "group_size": 128}),
                "gptq (4 bits, groups of 128)",
            ),
            (json!({"quant_method": "awq", "bits": 4}), "awq (4 bits)"),
            (
                json!({"quant_method": "fp8", "weight_block_size": [128, 128]}),
                "fp8 (a scale for each block of 128 x 128",
            ),
            (
                json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}),
                "compressed-tensors (float of 8 bits by channel)",
            ),
            (json!({"quant_method": "compressed-tensors"}), "compressed-tensors"),
            (json!({"quant_method": 3}), "no quant_method"),
            (json!([]), "no quant_method"),
        ] {
            let error = refused(Path::new("m"), &config).to_string();
            assert!(error.contains(words), "{config}: {error}");
        }
    }
}
