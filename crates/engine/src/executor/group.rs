//! Tensor parallelism: the same step on every rank of a group, of which the first one answers.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, unbounded};
use lora_core::{Adapter, Backend, Error, Result};

use super::device::DeviceExecutor;
use super::{Executor, GraphStats, SampleInputs, StepRows};
use crate::adapters::{SiteWrite, WriteError};
use crate::kv::BlockCopy;
use crate::sampling::TokenLogprobs;

/// What every rank does in one order, as their collective operations meet.
enum Order {
    CopyBlocks(Box<[BlockCopy]>),
    Forward(StepRows),
    Sample(SampleInputs),
    Tokens,
    ForgetSteps,
    WriteSite { slot: usize, site: usize, adapter: Option<Arc<Adapter>> },
}

/// What a rank says of an order: nothing but its failure, as the first rank has the results.
type Reply = std::result::Result<(), Failure>;

/// Why a rank failed.
enum Failure {
    Step(Error),
    Write(WriteError),
}

/// A rank on a thread of its own, but the first.
pub struct Peer {
    orders: Option<Sender<Order>>,
    replies: Receiver<Reply>,
    thread: Option<JoinHandle<()>>,
}

/// The ranks that hold a model together. The first one lives on the thread of the group.
pub struct Group<B: Backend> {
    own: DeviceExecutor<B>,
    peers: Vec<Peer>,
}

impl Peer {
    /// Makes a rank on a new thread by `make`, which also has to tell whether that worked.
    ///
    /// # Errors
    /// That of the system if it refuses a thread.
    pub fn spawn<B: Backend>(
        rank: usize,
        make: impl FnOnce() -> Option<DeviceExecutor<B>> + Send + 'static,
    ) -> std::io::Result<Self> {
        let ((orders, inbox), (outbox, replies)) = (unbounded(), unbounded());
        let serve = move || {
            let Some(mut executor) = make() else { return };
            for order in inbox {
                // Nobody waits any more if the group is gone; so is the other channel then.
                let _ = outbox.send(carry_out(&mut executor, order));
            }
        };
        let name = format!("loramux-rank-{rank}");
        let thread = Some(std::thread::Builder::new().name(name).spawn(serve)?);
        Ok(Self { orders: Some(orders), replies, thread })
    }

    fn send(&self, order: Order) {
        // A rank that is gone does not reply, which is noticed.
        if let Some(orders) = &self.orders {
            let _ = orders.send(order);
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // If it panicked, it has said so.
            let _ = thread.join();
        }
    }
}

fn carry_out<B: Backend>(executor: &mut DeviceExecutor<B>, order: Order) -> Reply {
    let done = match order {
        Order::CopyBlocks(copies) => executor.copy_blocks(&copies),
        Order::Forward(rows) => executor.forward(rows),
        Order::Sample(inputs) => executor.sample(inputs),
        Order::Tokens => executor.tokens().map(drop),
        Order::ForgetSteps => {
            executor.forget_steps();
            Ok(())
        }
        Order::WriteSite { slot, site, adapter } => {
            let written = executor.write_site(SiteWrite { slot, site, adapter: adapter.as_ref() });
            return written.map(drop).map_err(Failure::Write);
        }
    };
    // Ranks that are still in the step wait for this one.
    done.inspect_err(|_| executor.abort()).map_err(Failure::Step)
}

impl<B: Backend> Group<B> {
    /// A group of `own` and its peers.
    pub fn new(own: DeviceExecutor<B>, peers: Vec<Peer>) -> Self {
        Self { own, peers }
    }

    /// Has all ranks do what `with` says: the first one by `own`, the others by the order that `order` makes
    /// of it.
    fn all<P: Clone, T, E>(
        &mut self,
        with: P,
        order: impl Fn(P) -> Order,
        own: impl FnOnce(&mut DeviceExecutor<B>, P) -> std::result::Result<T, E>,
        failed: impl Fn(Failure) -> E,
    ) -> std::result::Result<T, E> {
        self.peers.iter().for_each(|peer| peer.send(order(with.clone())));
        let result = own(&mut self.own, with);
        let mut replies = Vec::with_capacity(self.peers.len());
        for peer in &self.peers {
            replies.push(peer.replies.recv().unwrap_or(Err(Failure::Step(Error::Peer))));
        }
        // The rank that failed first knows why; the others only know that one did.
        let cause =
            replies.into_iter().filter_map(Reply::err).reduce(|first, second| match first {
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
        order: impl Fn(P) -> Order,
        own: impl FnOnce(&mut DeviceExecutor<B>, P) -> Result<T>,
    ) -> Result<T> {
        let own = |executor: &mut DeviceExecutor<B>, with| {
            own(executor, with).inspect_err(|_| executor.abort())
        };
        self.all(with, order, own, |failure| match failure {
            Failure::Step(error) | Failure::Write(WriteError { cause: error, .. }) => error,
        })
    }
}

impl<B: Backend> Executor for Group<B> {
    fn is_asynchronous(&self) -> bool {
        self.own.is_asynchronous()
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<()> {
        self.step(copies, |copies| Order::CopyBlocks(copies.into()), DeviceExecutor::copy_blocks)
    }

    fn forward(&mut self, rows: StepRows) -> Result<()> {
        self.step(rows, Order::Forward, DeviceExecutor::forward)
    }

    fn sample(&mut self, inputs: SampleInputs) -> Result<()> {
        self.step(inputs, Order::Sample, DeviceExecutor::sample)
    }

    fn tokens(&mut self) -> Result<Vec<i32>> {
        self.step((), |()| Order::Tokens, |own, ()| own.tokens())
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
        // A rank that is gone fails the next step.
        let _ = self.step((), |()| Order::ForgetSteps, forget);
    }

    fn sites(&self) -> usize {
        self.own.sites()
    }

    fn write_site(&mut self, write: SiteWrite<'_>) -> std::result::Result<usize, WriteError> {
        let order = |SiteWrite { slot, site, adapter }: SiteWrite<'_>| Order::WriteSite {
            slot,
            site,
            adapter: adapter.cloned(),
        };
        self.all(write, order, DeviceExecutor::write_site, |failure| match failure {
            Failure::Write(error) => error,
            Failure::Step(cause) => WriteError { site: format!("site {}", write.site), cause },
        })
    }

    fn graphs(&self) -> GraphStats {
        self.own.graphs()
    }
}
