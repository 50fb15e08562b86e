//! The batch loop on the engine thread: continuous batching over any [`Executor`].
//!
//! The loop alternates between commands from the inbox (submissions, aborts, adapters) and steps of the
//! scheduler's running sequences, and reports tokens to each sequence's [`EventSink`]. With overlap
//! scheduling it launches a step before it reads the tokens of the one in progress.

mod adapters;
mod constraint;
mod event;
mod history;
mod message;
mod sink;
mod stats;
mod step;
#[cfg(test)]
mod tests;

use crossbeam_channel::{Receiver, TryRecvError};

pub use adapters::AdapterStore;
pub use event::{EndReason, Event, SequenceError};
pub use message::{Command, Submission};
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
    /// Whether its next step can be launched before the host has read the token being sampled.
    fn can_overlap(&self) -> bool {
        let Submission { plan, guide, siblings, .. } = &*self.submission;
        // Siblings are submitted once the prompt is computed, which should not be delayed by a step.
        plan.can_overlap() && guide.is_none() && siblings.is_empty()
    }

    /// Reports an event. If the receiver is gone, the sequence is finished.
    fn emit(&mut self, event: Event) {
        let delivered = self.submission.events.send(self.submission.id, event);
        self.finished |= !delivered;
    }

    /// Reports the last event, also for siblings that have not been submitted yet.
    fn finish(&mut self, event: &Event) {
        for sibling in self.submission.siblings.drain(..) {
            // The sibling ends whether or not its receiver is gone.
            let _ = sibling.events.send(sibling.id, event.clone());
        }
        self.emit(event.clone());
        self.finished = true;
    }
}

/// The state of the engine thread.
pub struct Core<E> {
    pub(crate) executor: E,
    pub(crate) scheduler: Scheduler<Active>,
    pub(crate) adapters: AdapterStore,
    pub(crate) inbox: Receiver<Command>,
    pub(crate) counts: Counts,
    /// Whether overlap scheduling is on: a step may be launched before the previous one has finished.
    pub(crate) overlaps: bool,
}

/// Counts since the engine's start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    steps: u64,
    overlapped_steps: u64,
    generated_tokens: u64,
    prompt_tokens: u64,
}

/// State of the step pipeline.
enum Pipeline {
    /// Nothing to do until a command arrives.
    Idle,
    /// A step has finished or adapters were moved, and no step is in progress.
    Ready,
    /// A step is in progress.
    Launched(Launched),
}

/// Result of draining the inbox.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Inbox {
    Empty,
    /// Commands were carried out.
    Handled,
    /// [`Command::Shutdown`] arrived, or all senders are gone.
    Closed,
}

impl<E: Executor> Core<E> {
    /// Runs the loop until all senders are gone or [`Command::Shutdown`] arrives.
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
                Pipeline::Ready
            });
            let in_progress = match &mut pipeline {
                Pipeline::Launched(launched) => &mut launched.works,
                Pipeline::Idle | Pipeline::Ready => &mut Vec::new(),
            };
            self.scheduler.retire(in_progress, |s| s.data.finished);
        }
    }

    /// Carries out the commands that have arrived; with `wait`, blocks until there is one.
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

    /// Carries out a command. Errors of sending a reply are ignored: the caller no longer waits for it.
    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.submit(submission),
            Command::Abort(id) => self.abort(|active| active.submission.id == id),
            Command::AbortRequest(id) => self.abort(|active| active.submission.request == id),
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

    /// Ends the sequences for which `hit` is true. Running ones are removed after the step in progress.
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

    /// Ends all running sequences with an error. Waiting sequences are not affected.
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
