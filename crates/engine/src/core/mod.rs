//! The batch loop, on a thread of its own: takes requests in and out at every step.

mod adapters;
mod constraint;
mod history;
mod message;
mod sink;
mod stats;
mod step;
#[cfg(test)]
mod tests;

use crossbeam_channel::{Receiver, TryRecvError};

pub use adapters::AdapterStore;
pub use message::{Command, EndReason, Event, SequenceError, Submission};
pub use sink::EventSink;
pub use stats::{AdapterStats, EngineStats, KvStats};

use crate::executor::Executor;
use crate::scheduler::{Scheduler, Sequence};
use history::History;
use step::Launched;

/// A submitted sequence with what the loop tracks for it.
#[derive(Debug)]
pub struct Active {
    submission: Box<Submission>,
    history: History,
    finished: bool,
}

impl Active {
    /// Whether its next token can be drawn before the host knows the one that is being drawn now.
    fn can_overlap(&self) -> bool {
        let Submission { plan, guide, siblings, .. } = &*self.submission;
        // Siblings start once the prompt is computed, which has to be noticed at once.
        plan.can_overlap() && guide.is_none() && siblings.is_empty()
    }

    /// Reports an event. Where no one listens any more, the sequence has no reason to go on.
    fn emit(&mut self, event: Event) {
        let is_heard = self.submission.events.send(self.submission.id, event);
        self.finished |= !is_heard;
    }

    /// Reports the last event, for outputs of the request that have not started, too.
    fn finish(&mut self, event: &Event) {
        for sibling in self.submission.siblings.drain(..) {
            // It ends whether someone listens or not.
            let _ = sibling.events.send(sibling.id, event.clone());
        }
        self.emit(event.clone());
        self.finished = true;
    }
}

/// Everything that lives on the engine thread.
pub struct Core<E> {
    pub(crate) executor: E,
    pub(crate) scheduler: Scheduler<Active>,
    pub(crate) adapters: AdapterStore,
    pub(crate) inbox: Receiver<Command>,
    pub(crate) counts: Counts,
    /// Whether a step may be launched before the one before it is done.
    pub(crate) overlaps: bool,
}

/// What was done since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    steps: u64,
    overlapped_steps: u64,
    generated_tokens: u64,
    prompt_tokens: u64,
}

/// State of the step pipeline.
enum Pipeline {
    /// There is nothing to do before a command comes.
    Idle,
    /// Something was computed or moved, and no step is under way.
    Moved,
    /// A step is under way.
    Launched(Launched),
}

/// What the inbox held.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Inbox {
    Empty,
    /// Commands, which were carried out.
    Handled,
    /// The order to stop, or no one is left to send commands.
    Closed,
}

impl<E: Executor> Core<E> {
    /// Serves commands until the senders are gone or [`Command::Shutdown`] comes.
    pub fn run(mut self) {
        let mut pipeline = Pipeline::Idle;
        loop {
            let inbox = self.take_commands(matches!(pipeline, Pipeline::Idle));
            if inbox == Inbox::Closed {
                return self.fail_running("the engine was stopped");
            }
            pipeline = self.step(pipeline, inbox).unwrap_or_else(|error| {
                self.executor.forget_steps();
                self.fail_running(&error.to_string());
                Pipeline::Moved
            });
            let under_way = match &mut pipeline {
                Pipeline::Launched(launched) => &mut launched.works,
                Pipeline::Idle | Pipeline::Moved => &mut Vec::new(),
            };
            self.scheduler.retire(under_way, |s| s.data.finished);
        }
    }

    /// Takes in what has arrived; with `wait`, waits for the first command.
    fn take_commands(&mut self, mut wait: bool) -> Inbox {
        let mut inbox = Inbox::Empty;
        loop {
            let command = if std::mem::take(&mut wait) {
                self.inbox.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.inbox.try_recv()
            };
            match command {
                Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => return Inbox::Closed,
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty) => return inbox,
            }
            inbox = Inbox::Handled;
        }
    }

    /// Whoever asked and has gone away needs no answer, so replies may fail.
    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.submit(submission),
            Command::Abort(id) => self.abort(|job| job.submission.id == id),
            Command::AbortRequest(id) => self.abort(|job| job.submission.request == id),
            Command::Read(outcome) => self.take_read(outcome),
            Command::Install { entry, adapter, pinned, reply } => {
                let _ = reply.send(self.install(&entry, adapter, pinned));
            }
            Command::Retire(entry) => self.scheduler.tiers.retire(entry.id),
            Command::Residence(entries, reply) => {
                let tiers = &self.scheduler.tiers;
                let _ = reply.send(entries.iter().map(|e| tiers.residence(e.id)).collect());
            }
            Command::Stats(reply) => {
                let _ = reply.send(self.stats());
            }
            Command::Shutdown => (),
        }
    }

    fn submit(&mut self, submission: Box<Submission>) {
        let history = History::new(&submission.prompt, &submission.plan);
        let adapter = submission.adapter.as_ref().map(|entry| self.adapters.register(entry));
        let mut sequence = Sequence::new(
            submission.prompt.clone(),
            submission.max_len,
            adapter,
            Active { submission, history, finished: false },
        );
        sequence.all_logits = sequence.data.submission.plan.wants_prompt_logits();
        self.scheduler.submit(sequence);
    }

    /// Ends the sequences that are hit. Running ones leave after the step, which may be under way.
    fn abort(&mut self, hit: impl Fn(&Active) -> bool) {
        let cancelled = Event::Finished(EndReason::Cancelled);
        for mut sequence in self.scheduler.cancel_waiting(|s| hit(&s.data)) {
            sequence.data.finish(&cancelled);
        }
        for sequence in self.scheduler.running_mut() {
            if hit(&sequence.data) && !sequence.data.finished {
                sequence.data.finish(&cancelled);
            }
        }
    }

    /// Ends all running sequences with an error; those waiting get their chance.
    fn fail_running(&mut self, cause: &str) {
        let failed = Event::Failed(SequenceError::Step(cause.to_owned()));
        for sequence in self.scheduler.running_mut() {
            if !sequence.data.finished {
                sequence.data.finish(&failed);
            }
        }
    }

    fn stats(&self) -> EngineStats {
        let Self { scheduler, adapters, counts, .. } = self;
        let (host, device) = scheduler.tiers.fill();
        EngineStats {
            steps: counts.steps,
            overlapped_steps: counts.overlapped_steps,
            generated_tokens: counts.generated_tokens,
            prompt_tokens: counts.prompt_tokens,
            graphs: self.executor.graphs(),
            scheduler: scheduler.stats(),
            kv: KvStats {
                blocks: scheduler.kv.plan().blocks,
                held: scheduler.kv.held(),
                prefix: scheduler.kv.stats(),
            },
            adapters: AdapterStats {
                use_of_tiers: scheduler.tiers.stats(),
                host,
                device,
                in_use: scheduler.tiers.in_use(),
                read_time: adapters.read_time,
                longest_read: adapters.longest_read,
            },
        }
    }
}
