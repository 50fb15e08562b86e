//! Configuration of the engine and of LoRA: files, overridden by flags.

use std::num::NonZeroUsize;
use std::path::Path;

use anyhow::{Context, Result, bail};
use lora_core::{LoraConfig, Rejections, files};
use loramux_engine::EngineConfig;
use serde_json::Value;

use crate::args::{EngineArgs, LoraConfigArgs};
use crate::exit::{Exit, Failure, OrExit};

/// The engine's configuration: the `--config` file, or else the defaults, overridden by flags.
///
/// # Errors
/// [`Exit::Usage`] if the file cannot be read or is malformed; the message has the file, the field and the line.
pub(crate) fn engine(args: &EngineArgs) -> Result<EngineConfig, Failure> {
    let mut config = match &args.config {
        Some(path) => {
            let read = read_yaml(path).with_context(|| format!("--config {}", path.display()));
            read.or_exit(Exit::Usage)?
        }
        None => EngineConfig::default(),
    };
    args.apply(&mut config);
    Ok(config)
}

/// The LoRA configuration: the defaults, overridden by `of_engine` (from the `--config` file), by the fields of the
/// `--lora-config` file, and by flags. Values are validated.
///
/// # Errors
/// [`Exit::Usage`] if the file cannot be read, has other fields than those of [`LoraConfig`], or values are out of
/// range; the message has the file and the field.
pub(crate) fn lora(
    args: &LoraConfigArgs,
    of_engine: Option<LoraConfig>,
) -> Result<LoraConfig, Failure> {
    let base = of_engine.unwrap_or_default();
    let Some(path) = &args.lora_config else {
        return Ok(overridden(base, args));
    };
    let checked = read_over(path, &base).and_then(|config| {
        let config = overridden(config, args);
        Rejections(config.validate()).into_result()?;
        Ok(config)
    });
    checked.with_context(|| format!("--lora-config {}", path.display())).or_exit(Exit::Usage)
}

fn overridden(mut config: LoraConfig, args: &LoraConfigArgs) -> LoraConfig {
    config.max_lora_rank = args.max_lora_rank.map_or(config.max_lora_rank, NonZeroUsize::get);
    config
}

fn read_yaml(path: &Path) -> Result<EngineConfig> {
    let text = files::read_text(path, files::MAX_CONFIG).context("cannot read the file")?;
    let config = EngineConfig::from_yaml(&text)?;
    let problems = config.lora_config.as_ref().map_or_else(Vec::new, LoraConfig::validate);
    Rejections(problems).into_result()?;
    Ok(config)
}

/// `base` with the fields that the file has.
fn read_over(path: &Path, base: &LoraConfig) -> Result<LoraConfig> {
    let text = files::read_text(path, files::MAX_CONFIG).context("cannot read the file")?;
    // For errors with their place in the file.
    parse(&text)?;
    let (mut config, given) = (serde_json::to_value(base)?, serde_json::from_str(&text)?);
    if let (Value::Object(config), Value::Object(given)) = (&mut config, given) {
        config.extend(given);
    }
    Ok(serde_json::from_value(config)?)
}

fn parse(text: &str) -> Result<LoraConfig> {
    // Serde would also accept an array of the values in field order.
    if !text.trim_start().starts_with('{') {
        bail!("is no JSON object; write one, such as {{\"allow_noop_adapter\": true}}");
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

    fn args(words: &str) -> crate::args::GenerateJob {
        let words = format!("loramux generate --model m --prompt x {words}");
        match crate::args::parse(words.split_whitespace().map(Into::into)).unwrap() {
            (crate::args::Command::Generate(job), _) => *job,
            (other, _) => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_override_the_file_and_the_file_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        std::fs::write(
            &path,
            "max_batch_size: 3\nmax_num_tokens: 99\nlora_config: {max_lora_rank: 8}",
        )
        .unwrap();
        let job = args(&format!("--config {} --max-batch-size 5 --dtype auto", path.display()));
        let mut config = engine(&job.engine).unwrap();
        assert_eq!((config.max_batch_size, config.max_num_tokens, config.dtype), (5, 99, None));
        assert_eq!(config.max_seq_len, EngineConfig::default().max_seq_len);
        let of_engine = config.lora_config.take();
        assert_eq!(lora(&job.lora_config, of_engine.clone()).unwrap().max_lora_rank, 8);
        let job = args("--max-lora-rank 4");
        assert_eq!(lora(&job.lora_config, of_engine).unwrap().max_lora_rank, 4);
        assert_eq!(lora(&args("").lora_config, None).unwrap(), LoraConfig::default());

        let path = dir.path().join("lora.json");
        std::fs::write(&path, r#"{"max_loras": 3}"#).unwrap();
        let job = args(&format!("--lora-config {}", path.display()));
        let base = LoraConfig { max_lora_rank: 8, max_loras: Some(2), ..LoraConfig::default() };
        let merged = lora(&job.lora_config, Some(base.clone())).unwrap();
        assert_eq!(merged, LoraConfig { max_loras: Some(3), ..base });
    }

    #[test]
    fn a_file_of_settings_is_refused_with_its_name_and_the_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        for (text, part) in [
            ("max_batch: 3", "line 1"),
            ("max_batch_size: 0x", "max_batch_size"),
            ("lora_config: {max_lora_rank: 0}", "max_lora_rank"),
        ] {
            std::fs::write(&path, text).unwrap();
            let refused =
                engine(&args(&format!("--config {}", path.display())).engine).unwrap_err();
            let message = format!("{:#}", refused.error);
            assert!(message.contains("config.yaml") && message.contains(part), "{message}");
            assert_eq!(refused.exit, Exit::Usage);
        }
        let absent = engine(&args("--extra_llm_api_options absent.yaml").engine).unwrap_err();
        assert!(format!("{:#}", absent.error).contains("absent.yaml"));
    }
}
