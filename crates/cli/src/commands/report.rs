//! The summary of a batch: counts, failed lines and lines without an answer.

use serde_json::value::RawValue;

use crate::answers::Answer;
use crate::exit::Exit;
use crate::meter::Meter;
use crate::streams::Streams;

/// Maximum lines to list of each kind.
const MAX_LISTED: usize = 20;

/// Maximum characters to show of an `id` or a message.
const MAX_CHARS: usize = 200;

/// The outcome of a batch, collected line by line.
#[derive(Default)]
pub(super) struct Report {
    answers: usize,
    failed: Named,
    unanswered: Named,
    unread_after: Option<u64>,
    ended: Option<String>,
    rate: String,
}

/// A count of lines, and the names of the first of them.
#[derive(Default)]
struct Named {
    count: usize,
    first: Vec<String>,
}

impl Named {
    fn push(&mut self, name: impl FnOnce() -> String) {
        self.count += 1;
        if self.first.len() < MAX_LISTED {
            self.first.push(name());
        }
    }

    fn print(&self, what: &str, streams: &mut Streams<'_>) {
        for name in &self.first {
            streams.print(format_args!("{what}: {name}"));
        }
        if self.count > self.first.len() {
            streams.print(format_args!("{what}: and {} more lines", self.count - self.first.len()));
        }
    }
}

/// `line 3 (id 7)`.
fn name(number: u64, id: &RawValue) -> String {
    format!("line {number} (id {})", shortened(id.get()))
}

/// The first line of a text, cut to [`MAX_CHARS`].
fn shortened(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default();
    match first.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &first[..end]),
        None => first.to_owned(),
    }
}

impl Report {
    /// Counts a written answer.
    pub fn answer(&mut self, number: u64, answer: &Answer) {
        self.answers += 1;
        if let Err(problem) = &answer.result {
            let prefix = format!("line {number}: ");
            let problem = problem.strip_prefix(&prefix).unwrap_or(problem);
            self.failed.push(|| format!("{}: {}", name(number, &answer.id), shortened(problem)));
        }
    }

    /// Counts a line without a written answer.
    pub fn unanswered(&mut self, number: u64, id: &RawValue) {
        self.unanswered.push(|| name(number, id));
    }

    /// Notes that lines after line `after`, if any, were not read.
    pub fn unread_after(&mut self, after: u64) {
        self.unread_after = Some(after);
    }

    /// Notes that the run ended early, and why.
    pub fn ended(&mut self, why: String) {
        self.ended = Some(why);
    }

    /// Notes the throughput.
    pub fn rate(&mut self, meter: &Meter) {
        self.rate = format!("{} tokens, {:.1} tokens/s", meter.tokens(), meter.tokens_per_second());
    }

    /// The exit code of a run that answered every line.
    pub fn exit(&self) -> Exit {
        if self.failed.count == 0 { Exit::Fine } else { Exit::Refused }
    }

    /// Prints the summary on standard error.
    pub fn print(&self, streams: &mut Streams<'_>) {
        self.failed.print("failed", streams);
        self.unanswered.print("not answered", streams);
        if let Some(after) = self.unread_after {
            streams.print(format_args!("not answered: whatever comes after line {after}"));
        }
        if let Some(why) = &self.ended {
            streams.print(why);
        }
        let Self { answers, failed, rate, .. } = self;
        streams.note(format_args!("summary: {answers} answers, {} failed, {rate}", failed.count));
    }
}
