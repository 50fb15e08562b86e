//! Sampling parameters of requests that do not set them: defaults of this program or of the model, and flags.

use std::path::Path;

use anyhow::{Context, bail};
use lora_core::files;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::args::{GenerateJob, SamplingDefaults};
use crate::exit::{Exit, Failure, OrExit};

const FILE: &str = "generation_config.json";

/// The fields of `generation_config.json` that control sampling; others are ignored.
#[derive(Deserialize)]
struct GenerationConfig {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<i32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    max_new_tokens: Option<usize>,
}

/// The sampling parameters of requests that do not set them.
pub(crate) struct InForce {
    /// The parameters, under the names of `SamplingParams` in JSON.
    pub fields: Map<String, Value>,
    /// One line for the user: the parameters and where they come from.
    pub note: String,
}

/// The defaults that the command line chooses, overridden by its flags.
///
/// # Errors
/// [`Exit::Usage`] if the model's defaults are asked for and cannot be read.
pub(crate) fn of(job: &GenerateJob) -> Result<InForce, Failure> {
    let mut fields = Map::new();
    let source = match job.sampling_defaults {
        SamplingDefaults::Loramux => "loramux's defaults".to_owned(),
        SamplingDefaults::Model => {
            let context = || format!("--sampling-defaults model: {}", job.model.display());
            fields = of_model(&job.model).with_context(context).or_exit(Exit::Usage)?;
            format!("the model's {FILE}")
        }
    };
    let defaults = words(&fields);
    fields.extend(job.sampling.clone());
    let flags = if job.sampling.is_empty() {
        String::new()
    } else {
        format!("; flags: {}", words(&job.sampling))
    };
    Ok(InForce { fields, note: format!("sampling: {source}: {defaults}{flags}") })
}

/// Fields and values as one line.
fn words(fields: &Map<String, Value>) -> String {
    let words: Vec<String> =
        fields.iter().map(|(field, value)| format!("{field} {value}")).collect();
    if words.is_empty() { "greedy, max_tokens 32".to_owned() } else { words.join(", ") }
}

fn of_model(model: &Path) -> anyhow::Result<Map<String, Value>> {
    if !model.is_dir() {
        bail!("only a folder has a {FILE}; give flags such as --temperature");
    }
    let text = files::read_text(&model.join(FILE), files::MAX_CONFIG).context(FILE)?;
    let config = serde_json::from_str(&text).context(FILE)?;
    Ok(fields(&config))
}

/// The parameters as transformers reads them: without `do_sample`, decoding is greedy.
fn fields(config: &GenerationConfig) -> Map<String, Value> {
    let &GenerationConfig { temperature, top_k, top_p, min_p, .. } = config;
    let mut fields = Map::new();
    let mut put = |field: &str, value: Option<Value>| {
        if let Some(value) = value {
            fields.insert(field.to_owned(), value);
        }
    };
    if config.do_sample == Some(true) {
        put("temperature", Some(json!(temperature.unwrap_or(1.0))));
        put("top_k", top_k.map(Value::from));
        put("top_p", top_p.map(Value::from));
        put("min_p", min_p.map(Value::from));
    }
    put("repetition_penalty", config.repetition_penalty.map(Value::from));
    put("max_tokens", config.max_new_tokens.map(Value::from));
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: &Value) -> Value {
        Value::Object(fields(&serde_json::from_value(config.clone()).unwrap()))
    }

    #[test]
    fn a_model_that_samples_says_how() {
        let config = json!({"do_sample": true, "temperature": 0.5, "top_k": 20, "eos_token_id": 2,
            "max_new_tokens": 7});
        assert_eq!(read(&config), json!({"temperature": 0.5, "top_k": 20, "max_tokens": 7}));
        assert_eq!(read(&json!({"do_sample": true})), json!({"temperature": 1.0}));
    }

    #[test]
    fn without_do_sample_only_what_greedy_sampling_uses_is_taken() {
        let config = json!({"temperature": 0.5, "top_p": 0.25, "repetition_penalty": 1.5});
        assert_eq!(read(&config), json!({"repetition_penalty": 1.5}));
    }
}
