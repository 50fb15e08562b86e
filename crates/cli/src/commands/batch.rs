//! Answering lines of requests: in their order, each as soon as it and those before it are done, and
//! without losing any when the run ends early.

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
use crate::requests::{Defaults, Intake, Line, Next};
use crate::signals::Signals;
use crate::streams::Streams;

/// How long one thing is waited for before the others are looked at.
const TICK: Duration = Duration::from_millis(20);

/// Answers `first`, if it is given, and the lines that come in, until there are no more.
pub(super) fn run(
    llm: &Llm,
    first: Option<Line>,
    intake: &Intake,
    defaults: &Defaults,
    sink: &Sink,
    streams: &mut Streams<'_>,
) -> Result<Exit, Failure> {
    let file = streams.stdout_file.take();
    // A FIFO opens when somebody reads it. Until then a signal ends the process as it always does.
    let output = Output::open(sink, &mut *streams.stdout, file)?;
    let signals = Signals::note().context("cannot take signals")?;
    let mut run = Run {
        batch: llm.batch(),
        // A batch is always full, and however many lines come, few are held.
        most: 2 * llm.info().max_batch_size,
        waiting: VecDeque::new(),
        places: HashMap::new(),
        gone: 0,
        taken: 0,
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
    report.tell(streams);
    exit
}

/// A batch under way.
struct Run<'a> {
    batch: Batch<'a>,
    /// Most lines that are held at a time.
    most: usize,
    /// Lines that are not written, in their order.
    waiting: VecDeque<Waiting>,
    /// Places of running requests in the order of lines, by their number in the batch.
    places: HashMap<usize, usize>,
    /// Lines that are no longer waiting: the place of the first that is.
    gone: usize,
    /// Number of the last line that was taken in.
    taken: u64,
    /// Whether more lines may come.
    open: bool,
    output: Output<'a>,
    report: Report,
    meter: Meter,
    bar: ProgressBar,
}

/// A line that is not written.
struct Waiting {
    number: u64,
    id: Box<RawValue>,
    lora: Option<String>,
    seed: Option<u64>,
    /// What became of it, once that is known.
    result: Option<Result<RequestOutput, String>>,
}

/// Why no more is done.
enum Ended {
    /// All lines are answered.
    Done,
    /// A signal came.
    Signal(Exit),
    /// An answer cannot be written.
    Unwritten(io::Error),
    /// Lines cannot be read; those before are answered.
    Unread(io::Error),
}

impl Run<'_> {
    /// Takes lines in and writes answers.
    fn drive(&mut self, intake: &Intake, defaults: &Defaults, signals: &Signals) -> Ended {
        let mut unread = None;
        loop {
            if let Some(exit) = signals.caught() {
                return Ended::Signal(exit);
            }
            let mut wait = TICK;
            if self.open && self.waiting.len() < self.most {
                let idle = self.batch.running() == 0;
                match intake.next_within(if idle { TICK } else { Duration::ZERO }) {
                    Next::Line(raw) => {
                        self.add(Line::read(&raw, defaults));
                        // Another one may be there: the engine runs them together.
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

    /// Hands the request of a line to the engine.
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
                self.places.insert(running, self.gone + self.waiting.len());
                None
            }
            Err(problem) => Some(Err(problem)),
        };
        self.taken = number;
        tracing::info!("line {number} is taken in");
        self.waiting.push_back(Waiting { number, id, lora, seed, result });
    }

    /// Waits for a request to end; whether one did.
    fn wait_for_answer(&mut self, limit: Duration) -> bool {
        let answered = self.batch.next_within(limit, &mut |update| {
            self.meter.update(&update);
            progress::show(&self.bar, &self.meter);
        });
        let Some((running, result)) = answered else { return false };
        let place = self.places.remove(&running).map(|place| place - self.gone);
        if let Some(waiting) = place.and_then(|place| self.waiting.get_mut(place)) {
            waiting.result = Some(result.map_err(|error| error.to_string()));
        }
        true
    }

    /// Writes the answers before the first that is not there yet.
    fn write_done(&mut self) -> io::Result<()> {
        while self.waiting.front().is_some_and(|waiting| waiting.result.is_some()) {
            self.write_first()?;
        }
        Ok(())
    }

    /// Writes the answer of the first line, which is there; the line stays if it cannot be written.
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
        self.gone += 1;
        Ok(())
    }

    /// Brings the run to its end: writes what is done, and notes what is not.
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
            self.report.not_taken_in(self.taken);
        }
        self.bar.finish_and_clear();
        self.report.rate(&self.meter);
        let lines = self.output.lines();
        let told = |kept: String| format!("{lines} answers are written{kept}");
        let exit = match ended {
            Ended::Done => self.output.finish().or_exit(Exit::Usage).map(|()| self.report.exit()),
            Ended::Signal(exit) => {
                self.report.ended(format!("ended by a signal: {}", told(self.output.give_up())));
                Ok(exit)
            }
            Ended::Unwritten(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                let kept = told(self.output.give_up());
                self.report.ended(format!("nobody reads the answers any more: {kept}"));
                Ok(Exit::ClosedPipe)
            }
            Ended::Unwritten(error) => Err(error)
                .with_context(|| {
                    format!("cannot write the answers: {}", told(self.output.give_up()))
                })
                .or_exit(Exit::Usage),
            Ended::Unread(error) => Err(error)
                .with_context(|| {
                    format!("cannot read the requests: {}", told(self.output.give_up()))
                })
                .or_exit(Exit::Usage),
        };
        (exit, self.report)
    }

    /// Waits for the requests that were ended, and writes the answers that were complete before.
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

/// Whether no output was cut short.
fn is_complete(result: &Result<RequestOutput, String>) -> bool {
    let cut = |output: &RequestOutput| {
        output.outputs.iter().any(|output| output.finish_reason == FinishReason::Cancelled)
    };
    !result.as_ref().is_ok_and(cut)
}
