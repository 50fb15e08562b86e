//! `polylora generate`.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};

use anyhow::Context;
use engine::text::ChatMessage;
use engine::{GenerateRequest, Llm, Prompt, RequestOutput, Update};
use lora_core::LoraConfig;
use serde_json::{Map, Value};

use crate::answers::Answer;
use crate::args::{GenerateJob, Sink, Source};
use crate::exit::{Exit, Failure, OrExit};
use crate::lora_file;
use crate::meter::Meter;
use crate::progress;
use crate::requests::{self, Defaults, Line};
use crate::startup;
use crate::streams::Streams;

/// Answers every request of the job in one call of the engine.
pub(super) fn run(job: &GenerateJob, streams: &mut Streams<'_>) -> Result<Exit, Failure> {
    let lines = read(job, streams)?;
    let lora = lora_config(job, &lines)?;
    // The file is opened first: nobody should learn after an hour that it cannot be written.
    let file = match &job.sink {
        Sink::File(path) => {
            let context = || format!("cannot write {}", path.display());
            Some(File::create(path).with_context(context).or_exit(Exit::Usage)?)
        }
        Sink::Text | Sink::Stdout => None,
    };
    let llm = startup::start(&job.model, &job.engine, lora, streams)?;
    match file {
        Some(file) => answer_lines(&llm, lines, &mut BufWriter::new(file), streams.live),
        None if job.sink == Sink::Text => answer_text(&llm, lines, streams),
        None => answer_lines(&llm, lines, &mut BufWriter::new(&mut *streams.stdout), streams.live),
    }
}

fn read(job: &GenerateJob, streams: &mut Streams<'_>) -> Result<Vec<Line>, Failure> {
    let defaults = Defaults {
        adapters: job.adapters.clone(),
        lora: job.lora.clone(),
        sampling: job.sampling.clone(),
    };
    let prompt = match &job.source {
        Source::Stdin => {
            let lines = requests::read_lines(streams.stdin, &defaults);
            return lines.context("cannot read standard input").or_exit(Exit::Usage);
        }
        Source::File(path) => {
            let lines = File::open(path)
                .and_then(|file| requests::read_lines(&mut BufReader::new(file), &defaults));
            let context = || format!("cannot read {}", path.display());
            return lines.with_context(context).or_exit(Exit::Usage);
        }
        Source::Prompt(text) => Prompt::Text(text.clone()),
        Source::Chat(text) => Prompt::Chat(vec![user(text)]),
    };
    let sampling = requests::sampling(&job.sampling, Map::new())
        .map_err(anyhow::Error::msg)
        .or_exit(Exit::Usage)?;
    let lora = job.lora.clone();
    Ok(vec![Line {
        id: Value::Null,
        lora: lora.as_ref().map(|lora| lora.lora_name.clone()),
        request: Ok(GenerateRequest { prompt, sampling, lora }),
    }])
}

/// A message of the user.
pub(super) fn user(text: &str) -> ChatMessage {
    ChatMessage { role: "user".to_owned(), content: text.to_owned() }
}

/// LoRA is on if it or an adapter is configured, or a line brings its own adapter.
fn lora_config(job: &GenerateJob, lines: &[Line]) -> Result<Option<LoraConfig>, Failure> {
    let brings = |line: &Line| line.request.as_ref().is_ok_and(|request| request.lora.is_some());
    let configured = job.lora_settings.file.is_some() || !job.adapters.is_empty();
    let wanted = configured || lines.iter().any(brings);
    wanted.then(|| lora_file::resolve(&job.lora_settings)).transpose()
}

/// Runs the lines that hold requests; answers are in the order of the lines.
fn answer(llm: &Llm, lines: Vec<Line>, watch: &mut dyn FnMut(Update<'_>)) -> Vec<Answer> {
    let requests = lines.iter().filter_map(|line| line.request.clone().ok()).collect();
    let mut results = llm.generate_each(requests, watch).into_iter();
    let answer = |Line { id, lora, request }| {
        let result = request.and_then(|_| match results.next() {
            Some(result) => result.map_err(|error| error.to_string()),
            None => Err("the engine gave no answer".to_owned()),
        });
        Answer { id, lora, result }
    };
    lines.into_iter().map(answer).collect()
}

fn exit_of(answers: &[Answer]) -> Exit {
    if answers.iter().all(|answer| answer.result.is_ok()) { Exit::Fine } else { Exit::Refused }
}

fn answer_lines(
    llm: &Llm,
    lines: Vec<Line>,
    writer: &mut dyn Write,
    live: bool,
) -> Result<Exit, Failure> {
    let sequences = |line: &Line| line.request.as_ref().map_or(0, |r| r.sampling.sequences());
    let bar = progress::batch_bar(lines.iter().map(sequences).sum(), live);
    let mut meter = Meter::start();
    let answers = answer(llm, lines, &mut |update| {
        meter.update(&update);
        progress::show(&bar, &meter);
    });
    bar.finish_and_clear();
    for answer in &answers {
        answer.write_line(writer).context("cannot write the answers")?;
    }
    writer.flush().context("cannot write the answers")?;
    Ok(exit_of(&answers))
}

/// Writes the text of the only request while it grows or, where there are several outputs that
/// would mix, when they are complete.
fn answer_text(llm: &Llm, lines: Vec<Line>, streams: &mut Streams<'_>) -> Result<Exit, Failure> {
    let single = |line: &Line| line.request.as_ref().is_ok_and(|r| r.sampling.sequences() == 1);
    let stream = lines.iter().all(single);
    let mut written = Ok(());
    let out = &mut *streams.stdout;
    let answers = answer(llm, lines, &mut |update| {
        if stream && written.is_ok() {
            written = out.write_all(update.piece.as_bytes()).and_then(|()| out.flush());
        }
    });
    written.context("cannot write the answer")?;
    for answer in &answers {
        match &answer.result {
            Ok(_) if stream => writeln!(streams.stdout)?,
            Ok(output) => write_numbered(streams.stdout, output)?,
            Err(error) => writeln!(streams.stderr, "error: {error}")?,
        }
    }
    streams.stdout.flush()?;
    Ok(exit_of(&answers))
}

fn write_numbered(out: &mut dyn Write, output: &RequestOutput) -> io::Result<()> {
    for completion in &output.outputs {
        writeln!(out, "[{}] {}", completion.index, completion.text)?;
    }
    Ok(())
}
