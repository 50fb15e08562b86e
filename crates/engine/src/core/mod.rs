//! The batch loop, on a thread of its own: takes requests in and out at every step.

mod history;
mod message;
mod sampler;
mod step;

use crossbeam_channel::{Receiver, TryRecvError};
use lora_core::Backend;

pub use message::{Command, Event, FinishReason, Submission, TokenLogprob, TokenLogprobs};

use crate::adapters::apply;
use crate::model::{DenseModel, KvCache, RunState};
use crate::scheduler::{Scheduler, Sequence};
use history::History;
pub use sampler::Sampler;

/// A submitted request with what the loop tracks for it.
#[derive(Debug)]
pub struct Job {
    submission: Box<Submission>,
    history: History,
    finished: bool,
}

impl Job {
    /// Reports an event. Where nobody listens any more, the sequence has no reason to go on.
    fn emit(&mut self, event: Event) {
        if self.submission.events.send((self.submission.id, event)).is_err() {
            self.finished = true;
        }
    }

    /// Reports the last event.
    fn finish(&mut self, event: Event) {
        self.emit(event);
        self.finished = true;
    }
}

/// Everything that lives on the engine thread.
pub struct Core<B: Backend> {
    pub(crate) be: B,
    pub(crate) queue: B::Queue,
    pub(crate) model: DenseModel<B>,
    pub(crate) kv: KvCache<B>,
    pub(crate) state: RunState<B>,
    pub(crate) sampler: Sampler<B>,
    pub(crate) scheduler: Scheduler<Job>,
}

impl<B: Backend> Core<B> {
    /// Serves commands until the senders are gone or [`Command::Shutdown`] comes.
    pub fn run(mut self, inbox: &Receiver<Command>) {
        while self.take_commands(inbox) {
            if let Err(error) = self.step() {
                self.fail_running(&error.to_string());
            }
            self.scheduler.retire(|s| s.data.finished);
        }
    }

    /// Takes in what has arrived, waiting for it if there is nothing else to do. `false`: stop.
    fn take_commands(&mut self, inbox: &Receiver<Command>) -> bool {
        loop {
            let command = if self.scheduler.is_idle() {
                inbox.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                inbox.try_recv()
            };
            match command {
                Ok(Command::Submit(submission)) => self.submit(submission),
                Ok(Command::Abort(id)) => self.abort(id),
                Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn submit(&mut self, submission: Box<Submission>) {
        let history = History::new(&submission.prompt, &submission.plan);
        let mut sequence = Sequence::new(
            submission.prompt.clone(),
            submission.max_len,
            submission.adapter.as_ref().map(|a| a.generation),
            Job { submission, history, finished: false },
        );
        sequence.all_logits = sequence.data.submission.plan.wants_prompt_logits();
        self.scheduler.submit(sequence);
    }

    fn abort(&mut self, id: u64) {
        let hit = |job: &Job| job.submission.id == id;
        for mut sequence in self.scheduler.cancel_waiting(|s| hit(&s.data)) {
            sequence.data.emit(Event::Finished(FinishReason::Cancelled));
        }
        for sequence in self.scheduler.running() {
            if hit(&sequence.data) {
                sequence.data.finish(Event::Finished(FinishReason::Cancelled));
            }
        }
        self.scheduler.retire(|s| s.data.finished);
    }

    /// Ends all running sequences with an error; those waiting get their chance.
    fn fail_running(&mut self, cause: &str) {
        for sequence in self.scheduler.running() {
            sequence.data.finish(Event::Failed(cause.to_owned()));
        }
    }

    /// Writes the adapters of admitted sequences into their slots; a failure ends only the
    /// requests that asked for that adapter.
    fn load_adapters(&mut self, admitted: &[usize]) {
        for index in admitted {
            let sequence = &mut self.scheduler.running()[*index];
            let (Some(slot), Some(adapter)) =
                (sequence.slot, sequence.data.submission.adapter.clone())
            else {
                continue;
            };
            let applied = apply(&self.be, &mut self.queue, &mut self.model, slot, &adapter);
            if let Err(error) = applied {
                self.scheduler.slots.forget(slot);
                for other in self.scheduler.running() {
                    if other.slot == Some(slot) {
                        other.data.finish(Event::Failed(error.to_string()));
                    }
                }
            }
        }
    }
}
