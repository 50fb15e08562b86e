//! `loramux generate`.

use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use lora_core::files;
use loramux_engine::text::ChatMessage;
use loramux_engine::{EngineConfig, GenerateRequest, Llm, Prompt, RequestOutput};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::batch;
use crate::args::{GenerateJob, Sink, Source};
use crate::exit::{Exit, Failure, OrExit};
use crate::meter::rate;
use crate::requests::{self, Defaults, Line, LineReader};
use crate::streams::Streams;
use crate::{adapters, model_geometry, output, sampling_defaults, settings, startup};

/// Answers the requests of the job.
pub(super) fn run(job: &GenerateJob, streams: &mut Streams<'_>) -> Result<Exit, Failure> {
    // Check as much as possible before the model is loaded, which takes long.
    output::check(job)?;
    let intake = intake(&job.source, streams)?;
    let sampling = sampling_defaults::of(job)?;
    let single = single(job, &sampling.fields)?;
    let config = engine_config(job)?;
    if let (Some(lora), false) = (&config.lora_config, job.adapters.is_empty()) {
        adapters::probe(&job.adapters, lora, &model_geometry::read(&job.model)?)?;
    }
    let llm = startup::start(&job.model, &job.engine.compute, config, streams)?;
    for adapter in &job.adapters {
        llm.register_adapter(adapter)?;
    }
    streams.note(&sampling.note);
    match (single, &job.sink) {
        (Some(line), Sink::Text) => answer_text(&llm, line, streams),
        (single, sink) => {
            let defaults = Defaults {
                model: model_name(&job.model),
                adapters: job.adapters.clone(),
                lora: job.lora.clone(),
                sampling: sampling.fields,
            };
            batch::run(&llm, single, &intake, &defaults, sink, streams)
        }
    }
}

/// Starts reading the lines of `source`.
fn intake(source: &Source, streams: &mut Streams<'_>) -> Result<LineReader, Failure> {
    match source {
        Source::Prompt(_) | Source::Chat(_) => Ok(LineReader::empty()),
        Source::Stdin => {
            let stdin = std::mem::replace(&mut streams.stdin, Box::new(io::empty()));
            Ok(LineReader::start(move || Ok(stdin)))
        }
        Source::File(path) => lines_of(path)
            .with_context(|| format!("cannot read {}", path.display()))
            .or_exit(Exit::Usage),
    }
}

/// Starts reading the lines of a file, which may be a pipe, as a shell's `<(command)` is.
fn lines_of(path: &Path) -> anyhow::Result<LineReader> {
    let kind = fs::metadata(path)?;
    if kind.is_dir() {
        bail!("it is a folder; give a file of requests");
    }
    if kind.is_file() {
        let file = files::open_regular(path)?;
        return Ok(LineReader::start(move || Ok(BufReader::new(file))));
    }
    let path = path.to_owned();
    Ok(LineReader::start(move || File::open(path).map(BufReader::new)))
}

/// The request of `--prompt` or `--chat`; `None` with `--requests`.
fn single(job: &GenerateJob, sampling: &Map<String, Value>) -> Result<Option<Line>, Failure> {
    let prompt = match &job.source {
        Source::Stdin | Source::File(_) => return Ok(None),
        Source::Prompt(text) => Prompt::Text(text.clone()),
        Source::Chat(text) => Prompt::Chat(vec![ChatMessage::user(text)]),
    };
    let sampling = requests::sampling(sampling, Map::new())
        .map_err(anyhow::Error::msg)
        .or_exit(Exit::Usage)?;
    sampling.validate().or_exit(Exit::Usage)?;
    let lora = job.lora.clone();
    let name = lora.as_ref().map(|lora| lora.lora_name.clone());
    let (request, seed) = requests::seeded(GenerateRequest { prompt, sampling, lora });
    let id = RawValue::NULL.to_owned();
    Ok(Some(Line { number: 1, id, lora: name, seed, request: Ok(request) }))
}

/// The engine's configuration. LoRA is enabled if it is configured, if an adapter is given, and for `--requests`, whose
/// lines may bring their own adapters.
fn engine_config(job: &GenerateJob) -> Result<EngineConfig, Failure> {
    let mut config = settings::engine(&job.engine)?;
    let lines = matches!(job.source, Source::File(_) | Source::Stdin);
    let of_file = config.lora_config.is_some() || job.lora_config.lora_config.is_some();
    if lines || of_file || !job.adapters.is_empty() {
        let mut lora = settings::lora(&job.lora_config, config.lora_config.take())?;
        lora.max_loras = job.max_loras.or(lora.max_loras);
        config.lora_config = Some(lora);
    }
    Ok(config)
}

/// The model's name for OpenAI requests: the last component of its path, without a file's extension.
fn model_name(path: &Path) -> String {
    let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = if absolute.is_dir() { absolute.file_name() } else { absolute.file_stem() };
    name.unwrap_or_default().to_string_lossy().into_owned()
}

/// Answers the only request as plain text. One output is streamed; several would interleave, so they are written when
/// all are finished.
fn answer_text(llm: &Llm, line: Line, streams: &mut Streams<'_>) -> Result<Exit, Failure> {
    if let Some(seed) = line.seed {
        streams.note(format_args!("seed: {seed}"));
    }
    let request = line.request.map_err(anyhow::Error::msg)?;
    let (several, start) = (request.sampling.sequences() > 1, Instant::now());
    let mut stream = llm.generate_async(request).or_exit(Exit::Refused)?;
    if !several {
        for delta in stream.blocking() {
            streams.stdout.write_all(delta.or_exit(Exit::Refused)?.text.as_bytes())?;
            streams.stdout.flush()?;
        }
        writeln!(streams.stdout)?;
    }
    let output = stream.finish().or_exit(Exit::Refused)?;
    if several {
        write_numbered(streams.stdout, &output)?;
    }
    streams.stdout.flush()?;
    let tokens = output.outputs.iter().map(|output| output.token_ids.len()).sum();
    streams.note(format_args!("{tokens} tokens, {:.1} tokens/s", rate(tokens, start.elapsed())));
    Ok(Exit::Fine)
}

fn write_numbered(out: &mut dyn Write, output: &RequestOutput) -> io::Result<()> {
    for completion in &output.outputs {
        writeln!(out, "[{}] {}", completion.index, completion.text)?;
    }
    Ok(())
}
