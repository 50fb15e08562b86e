//! Threads that read adapters from files, so that no step waits for a disk.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use lora_core::Adapter;

use super::error::RegistryError;
use super::registry::{AdapterRegistry, Registered};

/// The result of a read.
#[derive(Debug)]
pub struct ReadOutcome {
    /// The adapter.
    pub entry: Arc<Registered>,
    /// Its weights, or why it could not be read.
    pub result: Result<Arc<Adapter>, Arc<RegistryError>>,
    /// Duration of the read.
    pub took: Duration,
}

/// Reads adapters on its own threads. Dropping it waits until the threads have read what was asked for.
pub struct AdapterLoader {
    jobs: Option<Sender<Arc<Registered>>>,
    threads: Vec<JoinHandle<()>>,
}

impl AdapterLoader {
    /// Starts `threads` threads that call `report` with each result.
    ///
    /// # Errors
    /// The operating system's, if it cannot start a thread.
    pub fn start(
        threads: usize,
        registry: &Arc<AdapterRegistry>,
        report: impl Fn(ReadOutcome) + Clone + Send + 'static,
    ) -> std::io::Result<Self> {
        let (jobs, inbox) = unbounded();
        let start = |_| {
            let (registry, inbox, report) = (registry.clone(), inbox.clone(), report.clone());
            let name = "loramux-loader".to_owned();
            let work = move || read_all(&registry, &inbox, &report);
            std::thread::Builder::new().name(name).spawn(work)
        };
        let threads = (0..threads.max(1)).map(start).collect::<Result<_, _>>()?;
        Ok(Self { jobs: Some(jobs), threads })
    }

    /// Queues an adapter to be read.
    pub fn read(&self, entry: Arc<Registered>) {
        if let Some(jobs) = &self.jobs {
            // Cannot fail: the threads hold the receiver for as long as this sender exists.
            let _ = jobs.send(entry);
        }
    }
}

impl Drop for AdapterLoader {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing left to do.
            let _ = thread.join();
        }
    }
}

fn read_all(
    registry: &AdapterRegistry,
    inbox: &Receiver<Arc<Registered>>,
    report: &impl Fn(ReadOutcome),
) {
    for entry in inbox {
        let start = Instant::now();
        let result = registry.read(&entry).map(Arc::new).map_err(Arc::new);
        if result.is_err() && entry.generation().is_none() {
            registry.forget(&entry);
        }
        report(ReadOutcome { entry, result, took: start.elapsed() });
    }
}
