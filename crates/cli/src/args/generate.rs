//! `polylora generate`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use lora_core::LoraRequest;
use serde_json::{Map, Value};

use super::adapter::{NamedAdapter, named_adapter, numbered};
use super::engine::{EngineArgs, EngineSettings};
use super::lora::{FILE_HELP, LoraConfigArgs, LoraSettings};
use super::refuse;
use super::sampling::SamplingArgs;
use crate::requests;

const LONG_ABOUT: &str = "\
Answers prompts with the base model and any number of adapters.

One prompt comes from --prompt (taken as it is) or --chat (put in the model's chat template as a \
user's message); its answer is written as plain text while it is generated. Many come from \
--requests, one JSON object a line, and run in one batch whatever adapters they use; their answers \
are JSON lines in the same order. A line that cannot be answered gets a line with \"error\" and \
does not touch the others.";

const EXAMPLES: &str = r#"Examples:
  polylora generate --model my-model --prompt 'Once upon a time' --max-tokens 64
  polylora generate --model m.gguf --adapter sql=adapters/sql --lora sql --chat 'How many books?'
  polylora generate --model my-model --adapter sql=a --adapter pirate=b --requests questions.jsonl
  polylora generate --model my-model --adapter sql=a --lora-config lora.json --requests -

A line of --requests:
  {"id": 7, "messages": [{"role": "user", "content": "How many books?"}], "lora": "sql",
   "sampling": {"max_tokens": 20, "stop": ";"}}
It has exactly one of "prompt" (text), "input_ids" (token ids) and "messages"; at most one of "lora"
(a name given with --adapter; null: the base model) and "lora_request" ({"lora_name", "lora_int_id",
"lora_path"}). Fields of "sampling" override the flags one by one. Unknown fields are refused.

A line of answers:
  {"id", "lora", "prompt_token_ids", "outputs": [{"index", "text", "token_ids",
   "cumulative_logprob", "logprobs", "finish_reason", "stop_reason"}], "prompt_logprobs"}
or {"id", "lora", "error"}.
"#;

const EXIT_CODES: &str = "\nExit codes are listed by `polylora --help`.";

/// Heading of what goes in and out.
const REQUESTS: &str = "Requests and answers (one of --prompt, --chat and --requests)";

/// Answer prompts, with adapters or without
#[derive(Args)]
#[command(long_about = LONG_ABOUT, after_long_help = format!("{EXAMPLES}{FILE_HELP}{EXIT_CODES}"))]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    source: SourceArgs,
    /// Write answers as JSON lines to this file; -: to standard output
    #[arg(long, value_name = "FILE.jsonl|-", help_heading = REQUESTS)]
    output: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Adapters")]
struct LoraArgs {
    /// An adapter and the name that requests use for it; repeatable
    #[arg(long = "adapter", value_name = "NAME=PATH", value_parser = named_adapter)]
    adapters: Vec<NamedAdapter>,
    /// The adapter of requests that name none [default: the base model]
    #[arg(long, value_name = "NAME")]
    lora: Option<String>,
    #[command(flatten)]
    config: LoraConfigArgs,
    /// Adapters that one step can use [default: 8]
    #[arg(long, value_name = "N")]
    max_loras: Option<NonZeroUsize>,
}

#[derive(Args)]
#[command(next_help_heading = REQUESTS)]
#[group(required = true, multiple = false)]
struct SourceArgs {
    /// Continue this text
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Answer this message
    #[arg(long, value_name = "TEXT")]
    chat: Option<String>,
    /// Answer the requests of this file, one JSON object a line; -: of standard input
    #[arg(long, value_name = "FILE.jsonl|-")]
    requests: Option<PathBuf>,
}

/// Where requests come from.
#[derive(Clone, PartialEq, Debug)]
pub enum Source {
    /// A text to continue.
    Prompt(String),
    /// A message of a user.
    Chat(String),
    /// JSON lines of a file.
    File(PathBuf),
    /// JSON lines of standard input.
    Stdin,
}

/// Where answers go.
#[derive(Clone, PartialEq, Debug)]
pub enum Sink {
    /// As plain text to standard output.
    Text,
    /// As JSON lines to standard output.
    Stdout,
    /// As JSON lines to a file.
    File(PathBuf),
}

/// What `polylora generate` is to do.
#[derive(Clone, PartialEq, Debug)]
pub struct GenerateJob {
    /// The base model.
    pub model: PathBuf,
    /// The engine.
    pub engine: EngineSettings,
    /// Adapters by name, with ids in the order given.
    pub adapters: Vec<LoraRequest>,
    /// The adapter of requests that name none.
    pub lora: Option<LoraRequest>,
    /// How adapters are served.
    pub lora_settings: LoraSettings,
    /// Where requests come from.
    pub source: Source,
    /// Where answers go.
    pub sink: Sink,
    /// Sampling parameters that were given, as a JSON object.
    pub sampling: Map<String, Value>,
}

impl GenerateArgs {
    pub fn into_job(self) -> Result<GenerateJob, clap::Error> {
        let refuse = |message: String| refuse("generate", message);
        let adapters = numbered(self.lora.adapters).map_err(refuse)?;
        let lora = match &self.lora.lora {
            Some(name) => Some(requests::find_adapter(&adapters, name).map_err(refuse)?.clone()),
            None => None,
        };
        let source = self.source.source();
        let lines = matches!(source, Source::File(_) | Source::Stdin);
        let sink = match self.output {
            Some(path) if path.as_os_str() == "-" => Sink::Stdout,
            Some(path) => Sink::File(path),
            None if lines => Sink::Stdout,
            None => Sink::Text,
        };
        if sink == Sink::Text && self.sampling.wants_logprobs() {
            return Err(refuse(
                "log-probabilities have no place in plain text; add --output - for JSON".to_owned(),
            ));
        }
        let (model, engine) = self.engine.split();
        Ok(GenerateJob {
            model,
            engine,
            adapters,
            lora,
            lora_settings: LoraSettings {
                max_loras: self.lora.max_loras.map(NonZeroUsize::get),
                ..self.lora.config.settings()
            },
            source,
            sink,
            sampling: self.sampling.given(),
        })
    }
}

impl SourceArgs {
    fn source(self) -> Source {
        let requests = |path: PathBuf| match path.as_os_str() == "-" {
            true => Source::Stdin,
            false => Source::File(path),
        };
        // The group makes sure that one of them is given.
        let prompt = || Source::Prompt(self.prompt.unwrap_or_default());
        self.requests.map(requests).or(self.chat.map(Source::Chat)).unwrap_or_else(prompt)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::args::{Command, parse};

    fn job(words: &str) -> Result<GenerateJob, String> {
        let words = format!("polylora generate --model m {words}");
        match parse(words.split(' ').map(Into::into)) {
            Ok(Command::Generate(job)) => Ok(*job),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn only_given_sampling_flags_are_passed_on() {
        assert_eq!(job("--prompt x").unwrap().sampling, Map::new());
        let flags = "--prompt x --stop a --stop b --temperature 0.5 --ignore-eos --seed 3";
        let expected =
            json!({"temperature": 0.5, "seed": 3, "stop": ["a", "b"], "ignore_eos": true});
        assert_eq!(Value::Object(job(flags).unwrap().sampling), expected);
    }

    #[test]
    fn every_sampling_flag_is_a_sampling_parameter() {
        let flags = "--prompt x --output - --max-tokens 1 --temperature 1 --top-k 1 --top-p 1 \
                     --min-p 0 --seed 1 --stop s --stop-token-id 1 --min-tokens 1 --ignore-eos \
                     --repetition-penalty 1 --presence-penalty -1 --frequency-penalty -1 --n 1 \
                     --best-of 1 --logprobs 1 --prompt-logprobs 1";
        let words: Vec<&str> = flags.split_whitespace().collect();
        let fields = job(&words.join(" ")).unwrap().sampling;
        assert_eq!(fields.len(), 17);
        serde_json::from_value::<engine::SamplingParams>(Value::Object(fields)).unwrap();
    }

    #[test]
    fn one_source_is_required_and_lines_are_answered_in_lines() {
        assert!(job("--lora x").is_err());
        assert!(job("--prompt x --chat y").is_err());
        assert_eq!(job("--chat y").unwrap().sink, Sink::Text);
        assert_eq!(job("--requests -").unwrap().sink, Sink::Stdout);
        assert_eq!(job("--prompt x --output f").unwrap().sink, Sink::File("f".into()));
    }

    #[test]
    fn flags_that_cannot_be_honoured_are_refused() {
        for (flags, part) in [
            ("--prompt x --adapter a=1 --lora b", "known: a"),
            ("--prompt x --lora b", "no adapters"),
            ("--prompt x --adapter a=1 --adapter a=2", "given twice"),
            ("--prompt x --adapter a", "NAME=PATH"),
            ("--prompt x --logprobs 2", "--output"),
            ("--prompt x --max-batch-size 0", "non-zero"),
        ] {
            let error = job(flags).unwrap_err();
            assert!(error.contains(part), "{flags}: {error}");
        }
    }
}
