//! `loramux generate`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lora_core::LoraRequest;
use loramux_engine::sampling::SamplingError;
use serde_json::{Map, Value};

use super::adapter::{NamedAdapter, named_adapter};
use super::engine::EngineArgs;
use super::lora::{FILE_HELP, LoraConfigArgs};
use super::refuse;
use super::sampling::SamplingArgs;
use crate::{adapters, requests};

const LONG_ABOUT: &str = "\
Answers prompts with the base model and any number of adapters.

Give one prompt with --prompt (raw text) or --chat (a user message, put through the chat template); its answer is \
streamed to standard output as plain text. Give many with --requests, one JSON object a line; they run in one \
continuous batch, whatever adapters they use, and their answers are JSON lines in the same order. A line that \
cannot be answered gets an answer with \"error\" and does not affect the others.

Requests are read as they arrive, also from a pipe. Each answer is written as soon as it and all answers before it \
are finished. On SIGINT or SIGTERM the batch stops, writes the finished answers and lists the unfinished requests; a \
second signal ends the program at once. --output writes to FILE.*.partial and renames it to FILE at the end; if the \
run ends early, the partial file stays.";

const EXAMPLES: &str = r#"Examples:
  loramux generate --model my-model --prompt 'Once upon a time' --max-tokens 64
  loramux generate --model m.gguf --adapter sql=adapters/sql --lora sql --chat 'How many books?'
  loramux generate --model my-model --adapter sql=a --adapter pirate=b --requests questions.jsonl
  loramux generate --model my-model --adapter sql=a --lora-config lora.json --requests -

A line of --requests:
  {"id": 7, "messages": [{"role": "user", "content": "How many books?"}], "lora": "sql",
   "sampling": {"max_tokens": 20, "stop": ";"}}
It has exactly one of "prompt" (text), "input_ids" (token ids) and "messages", whose "content" is a
string or a list of {"type": "text", "text"}; at most one of "lora" (a name given with --adapter;
null: the base model) and "lora_request" ({"lora_name", "lora_int_id", "lora_path"}); and optionally
"max_tokens". Fields of "sampling" override the flags one by one. Unknown fields are refused.

Lines in OpenAI's batch format are accepted too; "model" is the base model or an adapter:
  {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions",
   "body": {"model": "sql", "messages": [{"role": "user", "content": "How many books?"}]}}
Unsupported fields are refused by name; omitted ones take the values of the flags.

A line of answers:
  {"id", "lora", "seed", "prompt_token_ids", "outputs": [{"index", "text", "token_ids",
   "cumulative_logprob", "logprobs", "finish_reason", "stop_reason"}], "prompt_logprobs"}
or {"id", "lora", "error"}. "id" is copied from the request verbatim; "seed" is present unless
decoding is greedy.
"#;

const EXIT_CODES: &str = "\nExit codes are listed by `loramux --help`.";

/// Help heading of the flags for requests and answers.
const REQUESTS: &str = "Requests and answers (one of --prompt, --chat and --requests)";

/// Answer prompts, with adapters or without
#[derive(Args)]
#[command(long_about = LONG_ABOUT, after_long_help = format!("{EXAMPLES}{FILE_HELP}{EXIT_CODES}"))]
pub(super) struct GenerateArgs {
    /// The base model: a folder with config.json and *.safetensors, or a .gguf file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: PathBuf,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    source: SourceArgs,
    /// Write answers to this file as JSON lines; -: to standard output
    #[arg(long, value_name = "FILE.jsonl|-", help_heading = REQUESTS)]
    output: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Source of sampling parameters that neither flags nor requests set
    #[arg(long, value_enum, default_value_t = SamplingDefaults::Loramux, help_heading = "Sampling")]
    sampling_defaults: SamplingDefaults,
}

#[derive(Args)]
#[command(next_help_heading = "Adapters")]
struct LoraArgs {
    /// An adapter, and the name by which requests select it; repeatable
    #[arg(long = "adapter", value_name = "NAME=PATH", value_parser = named_adapter)]
    adapters: Vec<NamedAdapter>,
    /// A folder with one subfolder for each adapter; the subfolder's name is the adapter's
    #[arg(long = "adapters", value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Adapter of requests that select none [default: the base model]
    #[arg(long, value_name = "NAME")]
    lora: Option<String>,
    #[command(flatten)]
    config: LoraConfigArgs,
    /// Maximum adapters on the device, which bounds those of one step [default: max_loras of the file,
    /// else 64]
    #[arg(long, value_name = "N")]
    max_loras: Option<NonZeroUsize>,
}

#[derive(Args)]
#[command(next_help_heading = REQUESTS)]
#[group(required = true, multiple = false)]
struct SourceArgs {
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// User message to answer, through the chat template
    #[arg(long, value_name = "TEXT")]
    chat: Option<String>,
    /// File of requests, one JSON object a line; -: standard input
    #[arg(long, value_name = "FILE.jsonl|-")]
    requests: Option<PathBuf>,
}

/// Source of sampling parameters that neither flags nor requests set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum SamplingDefaults {
    /// Greedy decoding, up to 32 tokens.
    Loramux,
    /// The model's generation_config.json.
    Model,
}

/// The source of requests.
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

/// The destination of answers.
#[derive(Clone, PartialEq, Debug)]
pub enum Sink {
    /// As plain text to standard output.
    Text,
    /// As JSON lines to standard output.
    Stdout,
    /// As JSON lines to a file.
    File(PathBuf),
}

/// The parsed arguments of `loramux generate`.
#[derive(Clone, PartialEq, Debug)]
pub struct GenerateJob {
    /// The base model.
    pub model: PathBuf,
    /// Engine settings.
    pub engine: EngineArgs,
    /// Adapters by name, with ids in the order given.
    pub adapters: Vec<LoraRequest>,
    /// Adapter of requests that select none; `None`: the base model.
    pub lora: Option<LoraRequest>,
    /// Settings for reading adapters.
    pub lora_config: LoraConfigArgs,
    /// Maximum adapters on the device.
    pub max_loras: Option<usize>,
    /// The source of requests.
    pub source: Source,
    /// The destination of answers.
    pub sink: Sink,
    /// Sampling parameters set by flags, as a JSON object.
    pub sampling: Map<String, Value>,
    /// Source of the other sampling parameters.
    pub sampling_defaults: SamplingDefaults,
}

impl GenerateArgs {
    pub fn into_job(self) -> Result<GenerateJob, clap::Error> {
        let refuse = |message: String| refuse("generate", message);
        let adapters = self.lora.requests().map_err(refuse)?;
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
                "plain text cannot show log-probabilities; add --output - for JSON".to_owned(),
            ));
        }
        let sampling = self.sampling.given();
        check_sampling(&sampling, lines || self.sampling_defaults == SamplingDefaults::Model)
            .map_err(refuse)?;
        Ok(GenerateJob {
            model: self.model,
            engine: self.engine,
            adapters,
            lora,
            lora_config: self.lora.config,
            max_loras: self.lora.max_loras.map(NonZeroUsize::get),
            source,
            sink,
            sampling,
            sampling_defaults: self.sampling_defaults,
        })
    }
}

impl LoraArgs {
    /// The adapters of the flags, then those of the folder.
    fn requests(&self) -> Result<Vec<LoraRequest>, String> {
        let named = |adapter: &NamedAdapter| (adapter.name.clone(), adapter.path.clone());
        let mut all: Vec<(String, PathBuf)> = self.adapters.iter().map(named).collect();
        if let Some(folder) = &self.folder {
            all.extend(adapters::in_folder(folder).map_err(|error| format!("{error:#}"))?);
        }
        adapters::numbered(all)
    }
}

/// Refuses sampling flags that no request could use. Flags that only contradict each other are accepted if
/// `others` (the model's defaults or a request's fields) may still complete them.
fn check_sampling(given: &Map<String, Value>, others: bool) -> Result<(), String> {
    let params = requests::sampling(&Map::new(), given.clone())?;
    match params.validate() {
        Err(
            SamplingError::GreedySequences { .. }
            | SamplingError::BestOfBelowN { .. }
            | SamplingError::MinTokensAboveMax { .. },
        ) if others => Ok(()),
        checked => checked.map_err(|error| error.to_string()),
    }
}

impl SourceArgs {
    fn source(self) -> Source {
        let requests = |path: PathBuf| {
            if path.as_os_str() == "-" { Source::Stdin } else { Source::File(path) }
        };
        // clap's group makes sure that exactly one of the three is given.
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
        let words = format!("loramux generate --model m {words}");
        match parse(words.split(' ').map(Into::into)) {
            Ok((Command::Generate(job), _)) => Ok(*job),
            Ok((other, _)) => panic!("{other:?}"),
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
        serde_json::from_value::<loramux_engine::SamplingParams>(Value::Object(fields)).unwrap();
    }

    #[test]
    fn what_a_request_may_complete_is_left_to_it() {
        assert!(job("--requests x --n 2").is_ok());
        assert!(job("--prompt x --n 2 --sampling-defaults model").is_ok());
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
            ("--prompt x --temperature nan", "finite"),
            ("--requests x --top-p inf", "finite"),
            ("--requests x --frequency-penalty=-inf", "finite"),
            ("--prompt x --free-gpu-memory-fraction nan", "finite"),
            ("--requests x --top-p 3", "`top_p` is 3"),
            ("--prompt x --n 2", "greedy"),
            ("--prompt x --adapters absent", "absent"),
        ] {
            let error = job(flags).unwrap_err();
            assert!(error.contains(part), "{flags}: {error}");
        }
    }
}
