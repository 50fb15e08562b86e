//! Tensor parallelism: the same commands on every rank of a group, in the same order.
//!
//! The first rank runs on the engine thread and returns the results, the others run on threads of their
//! own. All ranks gather the same logits and sample the same tokens, so no results are broadcast.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, unbounded};
use lora_core::{Adapter, Backend, Error, Result};

use super::device::DeviceExecutor;
use super::{Executor, GraphStats, SampleInputs, StepRows};
use crate::adapters::{SiteWrite, WriteError};
use crate::kv::BlockCopy;
use crate::sampling::TokenLogprobs;

/// A call of [`Executor`] for a rank on another thread. All ranks get the same commands in the same
/// order, so that their collective operations match.
enum RankCommand {
    CopyBlocks(Box<[BlockCopy]>),
    Forward(StepRows),
    Sample(SampleInputs),
    Tokens,
    ForgetSteps,
    WriteSite { slot: usize, site: usize, adapter: Option<Arc<Adapter>> },
}

/// A rank's reply to a command. It carries no result, as the first rank has the same one.
type RankReply = std::result::Result<(), Failure>;

/// Why a rank failed.
enum Failure {
    Step(Error),
    Write(WriteError),
}

/// A rank on a thread of its own. The first rank is not a peer.
pub struct Peer {
    commands: Option<Sender<RankCommand>>,
    replies: Receiver<RankReply>,
    thread: Option<JoinHandle<()>>,
}

/// The ranks of a tensor-parallel group: the first one on the calling thread, and its peers.
pub struct Group<B: Backend> {
    own: DeviceExecutor<B>,
    peers: Vec<Peer>,
}

impl Peer {
    /// Starts a rank on a new thread, on which `make` builds it. If `make` returns `None`, the thread ends;
    /// `make` reports the reason itself.
    ///
    /// # Errors
    /// The operating system's, if it cannot start a thread.
    pub fn spawn<B: Backend>(
        rank: usize,
        make: impl FnOnce() -> Option<DeviceExecutor<B>> + Send + 'static,
    ) -> std::io::Result<Self> {
        let ((commands, inbox), (outbox, replies)) = (unbounded(), unbounded());
        let serve = move || {
            let Some(mut executor) = make() else { return };
            for command in inbox {
                // Fails if the group was dropped. Then the inbox is closed, too.
                let _ = outbox.send(carry_out(&mut executor, command));
            }
        };
        let name = format!("loramux-rank-{rank}");
        let thread = Some(std::thread::Builder::new().name(name).spawn(serve)?);
        Ok(Self { commands: Some(commands), replies, thread })
    }

    fn send(&self, command: RankCommand) {
        // Fails if the rank has stopped, which is noticed by its missing reply.
        if let Some(commands) = &self.commands {
            let _ = commands.send(command);
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // The panic of a thread that panicked was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

fn carry_out<B: Backend>(executor: &mut DeviceExecutor<B>, command: RankCommand) -> RankReply {
    let done = match command {
        RankCommand::CopyBlocks(copies) => executor.copy_blocks(&copies),
        RankCommand::Forward(rows) => executor.forward(rows),
        RankCommand::Sample(inputs) => executor.sample(inputs),
        RankCommand::Tokens => executor.tokens().map(drop),
        RankCommand::ForgetSteps => {
            executor.forget_steps();
            Ok(())
        }
        RankCommand::WriteSite { slot, site, adapter } => {
            let written = executor.write_site(SiteWrite { slot, site, adapter: adapter.as_ref() });
            return written.map(drop).map_err(Failure::Write);
        }
    };
    // Other ranks may be waiting for this one in a collective operation.
    done.inspect_err(|_| executor.abort()).map_err(Failure::Step)
}

impl<B: Backend> Group<B> {
    /// A group of `own` and its peers.
    pub fn new(own: DeviceExecutor<B>, peers: Vec<Peer>) -> Self {
        Self { own, peers }
    }

    /// Runs a call on all ranks: `own` on the first one, the command made by `command` on its peers. If
    /// several ranks fail, returns the error of the one that failed first.
    fn all<P: Clone, T, E>(
        &mut self,
        with: P,
        command: impl Fn(P) -> RankCommand,
        own: impl FnOnce(&mut DeviceExecutor<B>, P) -> std::result::Result<T, E>,
        failed: impl Fn(Failure) -> E,
    ) -> std::result::Result<T, E> {
        self.peers.iter().for_each(|peer| peer.send(command(with.clone())));
        let result = own(&mut self.own, with);
        let mut replies = Vec::with_capacity(self.peers.len());
        for peer in &self.peers {
            replies.push(peer.replies.recv().unwrap_or(Err(Failure::Step(Error::Peer))));
        }
        // Ranks that were waiting for a failed one report `Error::Peer`; the cause is any other error.
        let cause =
            replies.into_iter().filter_map(RankReply::err).reduce(|first, second| match first {
                Failure::Step(Error::Peer) => second,
                first => first,
            });
        match (result, cause) {
            (Ok(value), None) => Ok(value),
            (_, Some(cause)) if !matches!(cause, Failure::Step(Error::Peer)) => Err(failed(cause)),
            (Err(error), _) => Err(error),
            (Ok(_), Some(cause)) => Err(failed(cause)),
        }
    }

    fn step<P: Clone, T>(
        &mut self,
        with: P,
        command: impl Fn(P) -> RankCommand,
        own: impl FnOnce(&mut DeviceExecutor<B>, P) -> Result<T>,
    ) -> Result<T> {
        let own = |executor: &mut DeviceExecutor<B>, with| {
            own(executor, with).inspect_err(|_| executor.abort())
        };
        self.all(with, command, own, |failure| match failure {
            Failure::Step(error) | Failure::Write(WriteError { cause: error, .. }) => error,
        })
    }
}

impl<B: Backend> Executor for Group<B> {
    fn is_asynchronous(&self) -> bool {
        self.own.is_asynchronous()
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<()> {
        self.step(
            copies,
            |copies| RankCommand::CopyBlocks(copies.into()),
            DeviceExecutor::copy_blocks,
        )
    }

    fn forward(&mut self, rows: StepRows) -> Result<()> {
        self.step(rows, RankCommand::Forward, DeviceExecutor::forward)
    }

    fn sample(&mut self, inputs: SampleInputs) -> Result<()> {
        self.step(inputs, RankCommand::Sample, DeviceExecutor::sample)
    }

    fn tokens(&mut self) -> Result<Vec<i32>> {
        self.step((), |()| RankCommand::Tokens, |own, ()| own.tokens())
    }

    fn logprobs(&mut self, targets: &[i32], k: usize) -> Result<Vec<TokenLogprobs>> {
        self.own.logprobs(targets, k)
    }

    fn logits(&mut self, rows: usize) -> Result<Vec<Vec<f32>>> {
        self.own.logits(rows)
    }

    fn forget_steps(&mut self) {
        let forget = |own: &mut DeviceExecutor<B>, ()| {
            own.forget_steps();
            Ok(())
        };
        // Fails if a rank has stopped. The next step then reports that.
        let _ = self.step((), |()| RankCommand::ForgetSteps, forget);
    }

    fn sites(&self) -> usize {
        self.own.sites()
    }

    fn write_site(&mut self, write: SiteWrite<'_>) -> std::result::Result<usize, WriteError> {
        let command = |SiteWrite { slot, site, adapter }: SiteWrite<'_>| RankCommand::WriteSite {
            slot,
            site,
            adapter: adapter.cloned(),
        };
        self.all(write, command, DeviceExecutor::write_site, |failure| match failure {
            Failure::Write(error) => error,
            Failure::Step(cause) => WriteError { site: format!("site {}", write.site), cause },
        })
    }

    fn graphs(&self) -> GraphStats {
        self.own.graphs()
    }
}
