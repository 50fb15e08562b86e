//! The settings of LoRA: those of a file, overridden by flags.

use std::path::Path;

use anyhow::{Context, Result, bail};
use lora_core::{LoraConfig, Rejections, files};

use crate::args::LoraSettings;
use crate::exit::{Exit, Failure, OrExit};

/// The configuration that the settings ask for, which breaks no rule by itself.
///
/// # Errors
/// [`Exit::Usage`] if the file cannot be read, holds something else than fields of [`LoraConfig`],
/// or holds values out of range; the message names the file and the field.
pub(crate) fn resolve(settings: &LoraSettings) -> Result<LoraConfig, Failure> {
    let Some(path) = &settings.file else {
        return Ok(overridden(LoraConfig::default(), settings));
    };
    let config = read(path).map(|config| overridden(config, settings));
    let checked = config.and_then(|config| {
        Rejections(config.validate()).into_result()?;
        Ok(config)
    });
    checked.with_context(|| format!("--lora-config {}", path.display())).or_exit(Exit::Usage)
}

fn overridden(mut config: LoraConfig, settings: &LoraSettings) -> LoraConfig {
    config.max_lora_rank = settings.max_lora_rank.unwrap_or(config.max_lora_rank);
    config.max_loras = settings.max_loras.or(config.max_loras);
    config
}

fn read(path: &Path) -> Result<LoraConfig> {
    let text = files::read_text(path, files::MAX_CONFIG).context("cannot read the file")?;
    parse(&text)
}

fn parse(text: &str) -> Result<LoraConfig> {
    // Serde would also read the values alone, in the order of the fields.
    if !text.trim_start().starts_with('{') {
        bail!("holds no JSON object; write one, such as {{\"allow_noop_adapter\": true}}");
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let config = serde_path_to_error::deserialize(&mut json)?;
    json.end()?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_any_fields_of_the_configuration() {
        assert_eq!(parse(" {}\n").unwrap(), LoraConfig::default());
        let config = parse(r#"{"max_loras": 3, "allow_noop_adapter": true}"#).unwrap();
        let expected =
            LoraConfig { max_loras: Some(3), allow_noop_adapter: true, ..LoraConfig::default() };
        assert_eq!(config, expected);
    }

    #[test]
    fn anything_else_is_refused_with_the_field_and_its_place() {
        for (text, parts) in [
            (r#"{"max_rank": 8}"#, ["max_rank: unknown field", "line 1"]),
            ("{\"max_loras\": 1,\n\"max_lora_rank\": \"8\"}", ["max_lora_rank: invalid", "line 2"]),
            (r#"{"trtllm_modules_to_hf_modules": {"attn_q": 3}}"#, ["hf_modules.attn_q", "line 1"]),
            (r#"{"max_loras": 1, "max_loras": 2}"#, ["duplicate field `max_loras`", "line 1"]),
            ("[]", ["no JSON object", "{"]),
            ("{", ["EOF", "line 1"]),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(parts.iter().all(|part| error.contains(part)), "{text}: {error}");
        }
    }

    #[test]
    fn flags_override_the_file_and_the_file_the_defaults() {
        let file = LoraConfig { max_lora_rank: 8, max_loras: Some(2), ..LoraConfig::default() };
        let flags = LoraSettings { max_lora_rank: Some(4), ..LoraSettings::default() };
        let config = overridden(file.clone(), &flags);
        assert_eq!((config.max_lora_rank, config.max_loras), (4, Some(2)));
        let flags = LoraSettings { max_loras: Some(5), ..LoraSettings::default() };
        let config = overridden(file, &flags);
        assert_eq!((config.max_lora_rank, config.max_loras), (8, Some(5)));
    }
}
