//! Threads that read adapters, so that no step ever waits for a disk.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use lora_core::Adapter;

use super::error::RegistryError;
use super::registry::{AdapterRegistry, Registered};

/// What became of a read.
#[derive(Debug)]
pub struct ReadOutcome {
    /// The adapter.
    pub entry: Arc<Registered>,
    /// Its weights, or why there are none.
    pub result: Result<Arc<Adapter>, Arc<RegistryError>>,
    /// How long it took.
    pub took: Duration,
}

/// Reads adapters on threads of its own. Dropping it ends them after what they are reading.
pub struct Loader {
    jobs: Option<Sender<Arc<Registered>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Loader {
    /// Starts `threads` threads that hand what they read to `report`.
    ///
    /// # Errors
    /// That of the system if it refuses a thread.
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

    /// Asks for an adapter to be read.
    pub fn read(&self, entry: Arc<Registered>) {
        if let Some(jobs) = &self.jobs {
            // The threads hold the other end until this one is gone.
            let _ = jobs.send(entry);
        }
    }
}

impl Drop for Loader {
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
