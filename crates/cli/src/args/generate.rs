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

One prompt comes from --prompt (taken as it is) or --chat (put in the model's chat template as a \
user's message); its answer is written as plain text while it is generated. Many come from \
--requests, one JSON object a line, and run in one batch whatever adapters they use; their answers \
are JSON lines in the same order. A line that cannot be answered gets a line with \"error\" and \
does not touch the others.

Lines are taken in as they come, also from a pipe, and each answer is written as soon as it and those \
before it are done. SIGINT or SIGTERM ends what runs, writes what is done and names what is not; the \
same again ends the program at once. --output writes to FILE.*.partial, which takes the place of FILE when all is \
done, and stays if the run ends before.";

const EXAMPLES: &str = r#"Examples:
  loramux generate --model my-model --prompt 'Once upon a time' --max-tokens 64
  loramux generate --model m.gguf --adapter sql=adapters/sql --lora sql --chat 'How many books?'
  loramux generate --model my-model --adapter sql=a --adapter pirate=b --requests questions.jsonl
  loramux generate --model my-model --adapter sql=a --lora-config lora.json --requests -

A line of --requests:
  {"id": 7, "messages": [{"role": "user", "content": "How many books?"}], "lora": "sql",
   "sampling": {"max_tokens": 20, "stop": ";"}}
It has exactly one of "prompt" (text), "input_ids" (token ids) and "messages", whose "content" is a
text or a list of {"type": "text", "text"}; at most one of "lora" (a name given with --adapter; null:
the base model) and "lora_request" ({"lora_name", "lora_int_id", "lora_path"}); and may have
"max_tokens". Fields of "sampling" override the flags one by one. Unknown fields are refused.

A line may have the shape of OpenAI's batches, too; its "model" is the base model or an adapter:
  {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions",
   "body": {"model": "sql", "messages": [{"role": "user", "content": "How many books?"}]}}
What cannot be honoured of it is refused by name, and what it leaves open is as the flags say.

A line of answers:
  {"id", "lora", "seed", "prompt_token_ids", "outputs": [{"index", "text", "token_ids",
   "cumulative_logprob", "logprobs", "finish_reason", "stop_reason"}], "prompt_logprobs"}
or {"id", "lora", "error"}. "id" is that of the request, as it is written there; "seed" is there where
tokens are drawn at random.
"#;

const EXIT_CODES: &str = "\nExit codes are listed by `loramux --help`.";

/// Heading of what goes in and out.
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
    /// Write answers as JSON lines to this file; -: to standard output
    #[arg(long, value_name = "FILE.jsonl|-", help_heading = REQUESTS)]
    output: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Where sampling parameters come from that neither flags nor requests give
    #[arg(long, value_enum, default_value_t = SamplingDefaults::Loramux, help_heading = "Sampling")]
    sampling_defaults: SamplingDefaults,
}

#[derive(Args)]
#[command(next_help_heading = "Adapters")]
struct LoraArgs {
    /// An adapter and the name that requests use for it; repeatable
    #[arg(long = "adapter", value_name = "NAME=PATH", value_parser = named_adapter)]
    adapters: Vec<NamedAdapter>,
    /// A folder with a folder for each adapter, which is named as its folder
    #[arg(long = "adapters", value_name = "DIR")]
    folder: Option<PathBuf>,
    /// The adapter of requests that name none [default: the base model]
    #[arg(long, value_name = "NAME")]
    lora: Option<String>,
    #[command(flatten)]
    config: LoraConfigArgs,
    /// Adapters that one step can use [default: 64, or as many as max_loras of a file]
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

/// Where sampling parameters come from that nobody gives.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum SamplingDefaults {
    /// This program: greedy, up to 32 tokens.
    Loramux,
    /// The model's generation_config.json.
    Model,
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

/// What `loramux generate` is to do.
#[derive(Clone, PartialEq, Debug)]
pub struct GenerateJob {
    /// The base model.
    pub model: PathBuf,
    /// The engine.
    pub engine: EngineArgs,
    /// Adapters by name, with ids in the order given.
    pub adapters: Vec<LoraRequest>,
    /// The adapter of requests that name none.
    pub lora: Option<LoraRequest>,
    /// How adapters are read.
    pub lora_config: LoraConfigArgs,
    /// Adapters that one step can use.
    pub max_loras: Option<usize>,
    /// Where requests come from.
    pub source: Source,
    /// Where answers go.
    pub sink: Sink,
    /// Sampling parameters that were given, as a JSON object.
    pub sampling: Map<String, Value>,
    /// Where others come from.
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
                "log-probabilities have no place in plain text; add --output - for JSON".to_owned(),
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

/// Refuses parameters that no request could have. Those that only disagree with each other may still
/// be completed by others, if there are `others`.
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
