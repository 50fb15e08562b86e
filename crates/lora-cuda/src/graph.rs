//! Recorded work, and its time on the device.
#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};
use lora_core::Result;

use crate::error::{failed, is_full};
use crate::memory::queue::{CudaQueue, Recording};

/// Work that was recorded once and can be started as a whole.
pub struct CudaGraph {
    graph: sys::CUgraph,
    /// Null until the graph is ready to run.
    executable: sys::CUgraphExec,
    /// The device's [`AdaptersEpoch`] at the recording.
    epoch: AdaptersEpoch,
    /// Keeps the context alive that the graph belongs to.
    _context: Arc<CudaContext>,
}

/// Counts changes of what recorded steps take for granted about the adapters of sites: a graph of another
/// epoch cannot be replayed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AdaptersEpoch(u64);

impl AdaptersEpoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// See [`lora_core::Backend::capture`].
pub fn capture(
    context: &Arc<CudaContext>,
    epoch: AdaptersEpoch,
    q: &mut CudaQueue,
    record: impl FnOnce(&mut CudaQueue) -> Result<()>,
) -> Result<Option<CudaGraph>> {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: the stream is the queue's own, and the capture is ended below, come what may.
    unsafe { result::stream::begin_capture(q.stream(), mode) }
        .map_err(failed("cuStreamBeginCapture"))?;
    q.set_recording(Recording::Now);
    let recorded = record(q);
    let outcome = q.set_recording(Recording::Before);
    // SAFETY: the capture was begun above.
    let graph = unsafe { result::stream::end_capture(q.stream()) };
    // What another engine of this process did at the same time may spoil a recording.
    let spoiled = sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if matches!(&graph, Err(error) if error.0 == spoiled) {
        return Ok(None);
    }
    // The graph is made an object first, so that it is freed where the rest fails.
    let graph = graph.map_err(failed("cuStreamEndCapture")).map(|graph| CudaGraph {
        graph,
        executable: std::ptr::null_mut(),
        epoch,
        _context: context.clone(),
    });
    if outcome == Recording::Failed {
        return Ok(None);
    }
    recorded?;
    graph?.instantiate()
}

/// See [`lora_core::Backend::replay`].
pub fn replay(epoch: AdaptersEpoch, q: &mut CudaQueue, graph: &CudaGraph) -> Result<bool> {
    if graph.epoch != epoch {
        return Ok(false);
    }
    // SAFETY: the graph lives as long as the borrow; its operands are the caller's to keep.
    let launched = unsafe { sys::cuGraphLaunch(graph.executable, q.stream()) };
    match launched.result() {
        // The first launch takes memory.
        Err(error) if is_full(error) => Ok(false),
        launched => launched.map_err(failed("cuGraphLaunch")).map(|()| true),
    }
}

/// Milliseconds that the device takes from the first to the last op that `work` issues.
///
/// # Errors
/// Those of the ops, or [`lora_core::Error::Device`].
pub fn time(
    context: &Arc<CudaContext>,
    q: &mut CudaQueue,
    work: impl FnOnce(&mut CudaQueue) -> Result<()>,
) -> Result<f32> {
    let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let event = || context.new_event(flags).map_err(failed("cuEventCreate"));
    let (start, end) = (event()?, event()?);
    q.mark(&start)?;
    work(q)?;
    q.mark(&end)?;
    q.synchronize()?;
    start.elapsed_ms(&end).map_err(failed("cuEventElapsedTime"))
}

impl CudaGraph {
    /// Makes the graph ready to run; `None` where the device is full, as steps that run eagerly take no memory.
    fn instantiate(mut self) -> Result<Option<Self>> {
        // SAFETY: the graph is that of a capture; `executable` is written if the call succeeds.
        let made =
            unsafe { sys::cuGraphInstantiateWithFlags(&raw mut self.executable, self.graph, 0) };
        match made.result() {
            Err(error) if is_full(error) => Ok(None),
            made => made.map_err(failed("cuGraphInstantiate")).map(|()| Some(self)),
        }
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: both were made by `capture` and are destroyed once. A failure cannot be reported from here.
        unsafe {
            if !self.executable.is_null() {
                let _ = sys::cuGraphExecDestroy(self.executable);
            }
            if !self.graph.is_null() {
                let _ = sys::cuGraphDestroy(self.graph);
            }
        }
    }
}
