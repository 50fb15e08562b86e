//! Answering JSON lines in one continuous batch.
//!
//! Answers keep the order of the lines, and each is written as soon as it and all before it are finished. Finished
//! answers survive a signal, a closed pipe and a full disk.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::time::Duration;

use anyhow::Context;
use indicatif::ProgressBar;
use loramux_engine::{Batch, FinishReason, Llm, RequestOutput};
use serde_json::value::RawValue;

use super::report::Report;
use crate::answers::Answer;
use crate::args::Sink;
use crate::exit::{Exit, Failure, OrExit};
use crate::meter::Meter;
use crate::output::Output;
use crate::progress;
use crate::requests::{Defaults, Line, LineReader, Next};
use crate::signals::Signals;
use crate::streams::Streams;

/// How long to wait for one event source before polling the others.
const TICK: Duration = Duration::from_millis(20);

/// Answers `first`, if given, then every line of `intake`.
pub(super) fn run(
    llm: &Llm,
    first: Option<Line>,
    intake: &LineReader,
    defaults: &Defaults,
    sink: &Sink,
    streams: &mut Streams<'_>,
) -> Result<Exit, Failure> {
    let file = streams.stdout_file.take();
    // Opening a FIFO blocks until it has a reader; until then signals keep their default action.
    let output = Output::open(sink, &mut *streams.stdout, file)?;
    let signals = Signals::install().context("cannot install signal handlers")?;
    let mut run = Run {
        batch: llm.batch(),
        // Keeps the batch full while memory stays bounded, however many lines arrive.
        max_held: 2 * llm.info().max_batch_size,
        waiting: VecDeque::new(),
        places: HashMap::new(),
        written: 0,
        last_line: 0,
        open: true,
        output,
        report: Report::default(),
        meter: Meter::start(),
        bar: progress::batch_bar(streams.live),
    };
    if let Some(line) = first {
        run.add(line);
    }
    let ended = run.drive(intake, defaults, &signals);
    let (exit, report) = run.end(ended);
    report.print(streams);
    exit
}

/// A running batch.
struct Run<'a> {
    batch: Batch<'a>,
    /// Maximum number of unwritten lines to hold.
    max_held: usize,
    /// Unwritten lines, in their order.
    waiting: VecDeque<Waiting>,
    /// Index of each running request among all lines, by its number in the batch.
    places: HashMap<usize, usize>,
    /// Lines written so far, which is the index of the first line in `waiting`.
    written: usize,
    /// Number of the last line that was read.
    last_line: u64,
    /// Whether the input may have more lines.
    open: bool,
    output: Output<'a>,
    report: Report,
    meter: Meter,
    bar: ProgressBar,
}

/// A line whose answer is not written yet.
struct Waiting {
    number: u64,
    id: Box<RawValue>,
    lora: Option<String>,
    seed: Option<u64>,
    /// The outcome, once it is known.
    result: Option<Result<RequestOutput, String>>,
}

/// Why the run ended.
enum Ended {
    /// All lines are answered.
    Done,
    /// A signal arrived.
    Signal(Exit),
    /// An answer cannot be written.
    Unwritten(io::Error),
    /// The input failed; all lines before are answered.
    Unread(io::Error),
}

impl Run<'_> {
    /// Reads lines and writes answers until the run ends.
    fn drive(&mut self, intake: &LineReader, defaults: &Defaults, signals: &Signals) -> Ended {
        let mut unread = None;
        loop {
            if let Some(exit) = signals.caught() {
                return Ended::Signal(exit);
            }
            let mut wait = TICK;
            if self.open && self.waiting.len() < self.max_held {
                let idle = self.batch.running() == 0;
                match intake.next_within(if idle { TICK } else { Duration::ZERO }) {
                    Next::Line(raw) => {
                        self.add(Line::read(&raw, defaults));
                        // Read further lines before waiting, so that they join the same step.
                        wait = Duration::ZERO;
                    }
                    Next::Nothing => (),
                    Next::End => self.open = false,
                    Next::Failed(error) => (self.open, unread) = (false, Some(error)),
                }
            }
            self.wait_for_answer(wait);
            if let Err(error) = self.write_done() {
                return Ended::Unwritten(error);
            }
            if !self.open && self.waiting.is_empty() {
                return unread.map_or(Ended::Done, Ended::Unread);
            }
        }
    }

    /// Submits the request of a line to the engine.
    fn add(&mut self, line: Line) {
        let Line { number, id, lora, seed, request } = line;
        let result = match request {
            Ok(request) => {
                self.bar.inc_length(request.sampling.sequences() as u64);
                self.batch.add(request).map_err(|error| error.to_string())
            }
            Err(problem) => Err(format!("line {number}: {problem}")),
        };
        let result = match result {
            Ok(running) => {
                self.places.insert(running, self.written + self.waiting.len());
                None
            }
            Err(problem) => Some(Err(problem)),
        };
        self.last_line = number;
        tracing::info!("line {number} is read");
        self.waiting.push_back(Waiting { number, id, lora, seed, result });
    }

    /// Waits up to `limit` for a request to finish; returns whether one did.
    fn wait_for_answer(&mut self, limit: Duration) -> bool {
        let answered = self.batch.next_within(limit, &mut |update| {
            self.meter.update(&update);
            progress::show(&self.bar, &self.meter);
        });
        let Some((running, result)) = answered else { return false };
        let place = self.places.remove(&running).map(|place| place - self.written);
        if let Some(waiting) = place.and_then(|place| self.waiting.get_mut(place)) {
            waiting.result = Some(result.map_err(|error| error.to_string()));
        }
        true
    }

    /// Writes all answers before the first unfinished one.
    fn write_done(&mut self) -> io::Result<()> {
        while self.waiting.front().is_some_and(|waiting| waiting.result.is_some()) {
            self.write_first()?;
        }
        Ok(())
    }

    /// Writes the answer of the first waiting line, if it is known. On an error the line stays in `waiting`.
    fn write_first(&mut self) -> io::Result<()> {
        let Some(Waiting { number, id, lora, seed, result }) = self.waiting.front_mut() else {
            return Ok(());
        };
        let Some(result) = result.take() else { return Ok(()) };
        let answer = Answer { id: id.clone(), lora: lora.clone(), seed: *seed, result };
        let line = answer.line()?;
        self.output.write_line(&line)?;
        self.report.answer(*number, &answer);
        tracing::info!("line {number} is answered");
        self.waiting.pop_front();
        self.written += 1;
        Ok(())
    }

    /// Ends the run: writes finished answers and reports the others.
    fn end(mut self, ended: Ended) -> (Result<Exit, Failure>, Report) {
        if !matches!(ended, Ended::Done | Ended::Unread(_)) {
            self.batch.abort();
        }
        let ended = match ended {
            Ended::Signal(exit) => {
                self.drain().map_or_else(Ended::Unwritten, |()| Ended::Signal(exit))
            }
            ended => ended,
        };
        for Waiting { number, id, .. } in &self.waiting {
            self.report.unanswered(*number, id);
        }
        if self.open {
            self.report.unread_after(self.last_line);
        }
        self.bar.finish_and_clear();
        self.report.rate(&self.meter);
        let lines = self.output.lines();
        let written = |kept: String| format!("{lines} answers are written{kept}");
        let exit = match ended {
            Ended::Done => self.output.finish().or_exit(Exit::Usage).map(|()| self.report.exit()),
            Ended::Signal(exit) => {
                self.report.ended(format!("ended by a signal: {}", written(self.output.give_up())));
                Ok(exit)
            }
            Ended::Unwritten(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                let kept = written(self.output.give_up());
                self.report.ended(format!("the reader of the answers closed the pipe: {kept}"));
                Ok(Exit::ClosedPipe)
            }
            Ended::Unwritten(error) => Err(error)
                .with_context(|| {
                    format!("cannot write the answers: {}", written(self.output.give_up()))
                })
                .or_exit(Exit::Usage),
            Ended::Unread(error) => Err(error)
                .with_context(|| {
                    format!("cannot read the requests: {}", written(self.output.give_up()))
                })
                .or_exit(Exit::Usage),
        };
        (exit, self.report)
    }

    /// Waits for the cancelled requests to end, and writes the answers that had finished before.
    fn drain(&mut self) -> io::Result<()> {
        while self.batch.running() > 0 {
            self.wait_for_answer(TICK);
        }
        let mut unanswered = VecDeque::new();
        while let Some(waiting) = self.waiting.front() {
            if waiting.result.as_ref().is_some_and(is_complete) {
                self.write_first()?;
            } else {
                unanswered.extend(self.waiting.pop_front());
            }
        }
        self.waiting = unanswered;
        Ok(())
    }
}

/// Whether no output was cancelled.
fn is_complete(result: &Result<RequestOutput, String>) -> bool {
    let cut = |output: &RequestOutput| {
        output.outputs.iter().any(|output| output.finish_reason == FinishReason::Cancelled)
    };
    !result.as_ref().is_ok_and(cut)
}
