//! Starting the threads of an engine: the engine thread, which runs the batch loop and the first rank, and a
//! thread for each other rank.

use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, bounded, unbounded};
use lora_core::{Backend, Comm};

use super::rank::RankConfig;
use crate::adapters::AdapterTiers;
use crate::core::{AdapterStore, Command, Core};
use crate::executor::{Executor, Group, Peer};
use crate::kv::KvBlocks;
use crate::llm::{EngineInfo, LlmError};
use crate::model::{ModelConfig, ModelError, Shard, WeightSource};
use crate::scheduler::Scheduler;

/// Fails unless the model can be split over `world` devices.
pub(in crate::llm) fn check_ranks(world: usize, config: &ModelConfig) -> Result<(), LlmError> {
    Ok(Shard { rank: 0, world }.check(config)?)
}

/// Callback for progress of loading, called with the number of layers loaded and of all layers.
pub type Progress = Box<dyn Fn(usize, usize) + Send>;

/// Makes the backend of a rank, on the rank's thread.
pub(in crate::llm) type Factory<B> = Box<dyn FnOnce() -> lora_core::Result<B> + Send>;

/// What the engine thread needs to start.
pub(in crate::llm) struct EngineStart {
    pub rank_config: RankConfig,
    pub source: Box<dyn WeightSource + Send>,
    pub progress: Progress,
    pub adapters: AdapterStore,
    pub inbox: Receiver<Command>,
}

impl EngineStart {
    /// Starts the engine on a thread of its own, and waits until it is ready.
    ///
    /// # Errors
    /// Why the engine could not start.
    pub fn spawn<B: Backend>(
        self,
        factories: Vec<Factory<B>>,
    ) -> Result<(EngineInfo, JoinHandle<()>), LlmError> {
        let (ready, started) = bounded(1);
        let run = move || match self.start(factories) {
            Ok((core, info)) => {
                // Fails only if the caller is gone. Then the command channel is closed, and the loop ends.
                let _ = ready.send(Ok(info));
                core.run();
            }
            Err(error) => drop(ready.send(Err(error))),
        };
        let thread = std::thread::Builder::new().name("loramux-engine".to_owned()).spawn(run);
        let thread = thread
            .map_err(|cause| LlmError::Thread { what: "the engine thread".to_owned(), cause })?;
        let info = started.recv().map_err(|_| LlmError::Stopped)??;
        Ok((info, thread))
    }

    /// Starts the ranks: the first one here, the others on threads of their own.
    fn start<B: Backend>(
        self,
        factories: Vec<Factory<B>>,
    ) -> Result<(Core<Group<B>>, EngineInfo), LlmError> {
        let Self { rank_config, source, .. } = self;
        let mut seats = B::Comm::seats(factories.len())?.into_iter().zip(factories);
        let Some((seat, factory)) = seats.next() else {
            return Err(LlmError::setting("tensor_parallel_size", 0, "1 or more"));
        };
        let (failed, failures) = unbounded();
        let mut peers = Vec::new();
        for (rank, (seat, factory)) in (1..).zip(seats) {
            let (rank_config, failed) = (rank_config.clone(), failed.clone());
            let make = move || {
                let started = factory().map_err(LlmError::from).and_then(|be| {
                    rank_config.start(be, seat, rank_config.open_weights()?, &|_| ())
                });
                match started {
                    Ok(started) => Some(started.executor),
                    // The first rank fails, too, and reports this error.
                    Err(error) => {
                        let _ = failed.send(error);
                        None
                    }
                }
            };
            let peer = Peer::spawn(rank, make);
            peers.push(
                peer.map_err(|cause| LlmError::Thread { what: format!("rank {rank}"), cause })?,
            );
        }
        drop(failed);
        let layers = rank_config.config.layers;
        let report = |done| (self.progress)(done, layers);
        let own = factory().map_err(LlmError::from);
        let own = own.and_then(|be| rank_config.start(be, seat, source, &report));
        let started = own.map_err(|error| first_cause(error, &failures))?;
        let settings = &rank_config.settings;
        let readers = settings.peft_cache_config.num_put_workers;
        let tiers = AdapterTiers::new(started.tiers, readers);
        let executor = Group::new(started.executor, peers);
        let overlaps = !settings.disable_overlap_scheduler.unwrap_or(!executor.is_asynchronous());
        let core = Core {
            executor,
            scheduler: Scheduler::new(rank_config.limits(), KvBlocks::new(started.kv), tiers),
            adapters: self.adapters,
            inbox: self.inbox,
            counts: Default::default(),
            overlaps,
        };
        Ok((core, started.info))
    }
}

/// The error of the rank that failed first. Ranks that were waiting for it only report `Error::Peer`.
fn first_cause(own: LlmError, of_peers: &Receiver<LlmError>) -> LlmError {
    let is_of_peer = |error: &LlmError| {
        matches!(error, LlmError::Model(ModelError::Device(lora_core::Error::Peer)))
    };
    if !is_of_peer(&own) {
        return own;
    }
    // The channel closes when all ranks have ended.
    of_peers.iter().find(|error| !is_of_peer(error)).unwrap_or(own)
}
