//! What a batch tells at its end: how much was done, and what was not.

use serde_json::value::RawValue;

use crate::answers::Answer;
use crate::exit::Exit;
use crate::meter::Meter;
use crate::streams::Streams;

/// How many lines are named of those that have no answer.
const NAMED: usize = 20;

/// Most characters of an `id` or a message that are told.
const SHOWN: usize = 200;

/// Counts and names of lines.
#[derive(Default)]
pub(super) struct Report {
    answers: usize,
    failed: Named,
    unanswered: Named,
    not_taken_in: Option<u64>,
    ended: Option<String>,
    rate: String,
}

/// Lines, the first of them with their names.
#[derive(Default)]
struct Named {
    count: usize,
    first: Vec<String>,
}

impl Named {
    fn push(&mut self, name: impl FnOnce() -> String) {
        self.count += 1;
        if self.first.len() < NAMED {
            self.first.push(name());
        }
    }

    fn tell(&self, what: &str, streams: &mut Streams<'_>) {
        for name in &self.first {
            streams.tell(format_args!("{what}: {name}"));
        }
        if self.count > self.first.len() {
            streams.tell(format_args!("{what}: and {} more lines", self.count - self.first.len()));
        }
    }
}

/// `line 3 (id 7)`.
fn name(number: u64, id: &RawValue) -> String {
    format!("line {number} (id {})", shortened(id.get()))
}

/// The beginning of the first line of a text.
fn shortened(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default();
    match first.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &first[..end]),
        None => first.to_owned(),
    }
}

impl Report {
    /// Takes in an answer that was written.
    pub fn answer(&mut self, number: u64, answer: &Answer) {
        self.answers += 1;
        if let Err(problem) = &answer.result {
            let prefix = format!("line {number}: ");
            let problem = problem.strip_prefix(&prefix).unwrap_or(problem);
            self.failed.push(|| format!("{}: {}", name(number, &answer.id), shortened(problem)));
        }
    }

    /// Takes in a line whose answer is not written.
    pub fn unanswered(&mut self, number: u64, id: &RawValue) {
        self.unanswered.push(|| name(number, id));
    }

    /// Takes in that lines after this one, if there are any, were not taken in.
    pub fn not_taken_in(&mut self, after: u64) {
        self.not_taken_in = Some(after);
    }

    /// Says that the run ended early, and why.
    pub fn ended(&mut self, why: String) {
        self.ended = Some(why);
    }

    /// Takes in how fast it went.
    pub fn rate(&mut self, meter: &Meter) {
        self.rate = format!("{} tokens, {:.1} tokens/s", meter.tokens(), meter.tokens_per_second());
    }

    /// The exit code of a run that answered every line.
    pub fn exit(&self) -> Exit {
        if self.failed.count == 0 { Exit::Fine } else { Exit::Refused }
    }

    /// Tells all of it on standard error.
    pub fn tell(&self, streams: &mut Streams<'_>) {
        self.failed.tell("failed", streams);
        self.unanswered.tell("not answered", streams);
        if let Some(after) = self.not_taken_in {
            streams.tell(format_args!("not answered: whatever comes after line {after}"));
        }
        if let Some(why) = &self.ended {
            streams.tell(why);
        }
        let Self { answers, failed, rate, .. } = self;
        streams.note(format_args!("summary: {answers} answers, {} failed, {rate}", failed.count));
    }
}
