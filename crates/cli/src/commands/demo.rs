//! `loramux demo`.

use std::path::{Path, PathBuf};

use lora_core::{LoraConfig, LoraRequest};
use loramux_engine::text::ChatMessage;
use loramux_engine::{
    EngineConfig, FinishReason, GenerateRequest, Llm, LlmError, Prompt, RequestOutput,
    SamplingParams, Update,
};

use crate::args::DemoJob;
use crate::exit::{Exit, Failure, OrExit};
use crate::meter::{Meter, rate};
use crate::progress::LiveLines;
use crate::streams::Streams;
use crate::{adapters, model_fetch, startup, table};

/// The questions to the base model and to every adapter.
const QUESTIONS: [&str; 3] = [
    "What is the capital of Spain?",
    "Show the title of books with pages greater than 300.",
    "Why is the sky blue?",
];

/// Upper bound on the tokens of a question in the chat template, for sizing the KV cache.
const MAX_PROMPT_TOKENS: usize = 256;

/// One question to the base model or to one adapter.
struct Turn<'a> {
    question: &'static str,
    /// Number of the question, from 1.
    number: usize,
    /// `None`: the base model.
    lora: Option<&'a LoraRequest>,
}

impl Turn<'_> {
    fn speaker(&self) -> &str {
        self.lora.map_or("(base model)", |lora| &lora.lora_name)
    }

    fn label(&self) -> String {
        format!("Q{} {:<12}", self.number, self.speaker())
    }
}

/// Asks the base model and every adapter all questions, in one batch.
pub(super) fn run(job: &DemoJob, streams: &mut Streams<'_>) -> Result<Exit, Failure> {
    let found = adapters::in_folder(&job.adapters).or_exit(Exit::Usage)?;
    let adapters = adapters::numbered(found).map_err(anyhow::Error::msg).or_exit(Exit::Usage)?;
    let turns = turns(&adapters);
    let model = match &job.model {
        Some(path) => path.clone(),
        None => fetched_model(streams).or_exit(Exit::Model)?,
    };
    let mut config = EngineConfig {
        max_batch_size: turns.len(),
        lora_config: Some(LoraConfig { max_loras: Some(adapters.len()), ..LoraConfig::default() }),
        ..EngineConfig::default()
    };
    config.kv_cache_config.max_tokens = Some(turns.len() * (MAX_PROMPT_TOKENS + job.max_tokens));
    job.compute.apply(&mut config);
    let llm = startup::start(&model, &job.compute, config, streams)?;
    announce(&turns, streams)?;
    let mut meter = Meter::start();
    let answers = answer(&llm, &turns, job.max_tokens, &mut meter, streams);
    write_table(&turns, &answers, streams)?;
    write_summary(&llm, &model, &answers, &meter, streams)?;
    Ok(if answers.iter().all(Result::is_ok) { Exit::Fine } else { Exit::Refused })
}

fn turns(adapters: &[LoraRequest]) -> Vec<Turn<'_>> {
    let speakers = || std::iter::once(None).chain(adapters.iter().map(Some));
    let turn = |number, question| speakers().map(move |lora| Turn { question, number, lora });
    (1..).zip(QUESTIONS).flat_map(|(number, question)| turn(number, question)).collect()
}

fn fetched_model(streams: &mut Streams<'_>) -> anyhow::Result<PathBuf> {
    let path = model_fetch::cached_model_path()?;
    if !path.is_file() {
        writeln!(
            streams.stderr,
            "downloading {} (93 MB) to {}",
            model_fetch::MODEL_FILE,
            path.display()
        )?;
    }
    model_fetch::fetch_model()
}

fn announce(turns: &[Turn<'_>], streams: &mut Streams<'_>) -> Result<(), Failure> {
    for (number, question) in (1..).zip(QUESTIONS) {
        writeln!(streams.stderr, "Q{number}: {question}")?;
    }
    let (answers, speakers) = (turns.len(), turns.len() / QUESTIONS.len());
    writeln!(
        streams.stderr,
        "{answers} answers in one batch: each question to the base model and {} adapters",
        speakers - 1
    )?;
    Ok(())
}

/// Runs the batch. On a terminal the texts are shown as they are generated, elsewhere one line for each finished
/// answer.
fn answer(
    llm: &Llm,
    turns: &[Turn<'_>],
    max_tokens: usize,
    meter: &mut Meter,
    streams: &mut Streams<'_>,
) -> Vec<Result<RequestOutput, LlmError>> {
    let sampling = SamplingParams { max_tokens: Some(max_tokens), ..SamplingParams::default() };
    let request = |turn: &Turn<'_>| GenerateRequest {
        prompt: Prompt::Chat(vec![ChatMessage::user(turn.question)]),
        sampling: sampling.clone(),
        lora: turn.lora.cloned(),
    };
    let requests = turns.iter().map(request).collect();
    let labels = turns.iter().map(Turn::label);
    let mut lines = LiveLines::new(labels, streams.live);
    let answers = llm.generate_each(requests, &mut |update: Update<'_>| {
        meter.update(&update);
        lines.push(update.request, update.piece);
        if update.finished && !streams.live {
            let Some(turn) = turns.get(update.request) else { return };
            let (done, all, tokens) = (meter.finished(), turns.len(), update.tokens);
            // A failure to show progress is ignored; writing the answers is checked later.
            let _ = writeln!(streams.stderr, "[{done}/{all}] {} {tokens} tokens", turn.label());
        }
    });
    lines.clear();
    answers
}

fn write_table(
    turns: &[Turn<'_>],
    answers: &[Result<RequestOutput, LlmError>],
    streams: &mut Streams<'_>,
) -> Result<(), Failure> {
    let mut table = table::framed(&["question", "adapter", "answer"], streams.live);
    let mut asked = "";
    for (turn, answer) in turns.iter().zip(answers) {
        let question = if turn.question == asked { "" } else { turn.question };
        asked = turn.question;
        table.add_row([question, turn.speaker(), &shown(answer)]);
    }
    writeln!(streams.stdout, "{table}")?;
    Ok(())
}

/// The text of an answer, with an ellipsis if it was cut off by max_tokens.
fn shown(answer: &Result<RequestOutput, LlmError>) -> String {
    let output = match answer {
        Ok(output) => output.outputs.first(),
        Err(error) => return format!("error: {error}"),
    };
    let Some(output) = output else { return String::new() };
    match output.finish_reason {
        FinishReason::Length => format!("{} ...", output.text),
        FinishReason::Stop | FinishReason::Cancelled => output.text.clone(),
    }
}

fn write_summary(
    llm: &Llm,
    model: &Path,
    answers: &[Result<RequestOutput, LlmError>],
    meter: &Meter,
    streams: &mut Streams<'_>,
) -> Result<(), Failure> {
    let prompts = answers.iter().flatten().map(|output| output.prompt_token_ids.len()).sum();
    let info = llm.info();
    let adapters = answers.len() / QUESTIONS.len() - 1;
    writeln!(
        streams.stdout,
        "{} tokens in {:.2} s, {:.1} tokens/s (prefill: {prompts} tokens in {:.2} s, {:.1} \
         tokens/s; decode: {:.1} tokens/s)",
        meter.tokens(),
        meter.elapsed().as_secs_f64(),
        meter.tokens_per_second(),
        meter.prefill_time().as_secs_f64(),
        rate(prompts, meter.prefill_time()),
        meter.decode_tokens_per_second(),
    )?;
    writeln!(
        streams.stdout,
        "batch of {}, {adapters} adapters, {}, {} backend, {}",
        answers.len(),
        info.dtype,
        info.backend,
        model.display()
    )?;
    Ok(())
}
