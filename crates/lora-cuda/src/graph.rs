//! Recorded work, and its time on the device.
#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};
use lora_core::{Error, Result};

use crate::error::failed;
use crate::{Cuda, CudaQueue};

/// Work that was recorded once and can be started as a whole.
pub struct CudaGraph {
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
    /// Keeps the context alive that the graph belongs to.
    _context: Arc<CudaContext>,
}

impl Cuda {
    /// Records the ops that `record` issues, which are not run. They must have run before with the
    /// same shapes, so that plans and scratch memory are there.
    ///
    /// # Errors
    /// Those of the ops, or [`Error::Device`] for one that cannot be recorded.
    pub fn record(
        &self,
        q: &mut CudaQueue,
        record: impl FnOnce(&mut CudaQueue) -> Result<()>,
    ) -> Result<CudaGraph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is the queue's own, and the capture is ended below, come what may.
        unsafe { result::stream::begin_capture(q.stream(), mode) }
            .map_err(failed("cuStreamBeginCapture"))?;
        q.set_recording(true);
        let recorded = record(q);
        q.set_recording(false);
        // SAFETY: the capture was begun above.
        let graph = unsafe { result::stream::end_capture(q.stream()) };
        recorded?;
        let graph = graph.map_err(failed("cuStreamEndCapture"))?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: the graph was made above; `executable` is written if the call succeeds.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0) };
        made.result().map_err(failed("cuGraphInstantiate"))?;
        Ok(CudaGraph { graph, executable, _context: self.context.clone() })
    }

    /// Milliseconds that the device takes from the first to the last op that `work` issues.
    ///
    /// # Errors
    /// Those of the ops, or [`Error::Device`].
    pub fn time(
        &self,
        q: &mut CudaQueue,
        work: impl FnOnce(&mut CudaQueue) -> Result<()>,
    ) -> Result<f32> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = || self.context.new_event(flags).map_err(failed("cuEventCreate"));
        let (start, end) = (event()?, event()?);
        q.mark(&start)?;
        work(q)?;
        q.mark(&end)?;
        q.synchronize()?;
        start.elapsed_ms(&end).map_err(failed("cuEventElapsedTime"))
    }
}

impl CudaGraph {
    /// Starts the recorded work.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn replay(&self, q: &mut CudaQueue) -> Result<()> {
        // SAFETY: the graph lives as long as `self`; its operands are the caller's to keep.
        unsafe { sys::cuGraphLaunch(self.executable, q.stream()) }
            .result()
            .map_err(|e| Error::Device(format!("cuGraphLaunch: {e:?}")))
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: both were made by `record` and are destroyed once. Failures can be told to nobody.
        unsafe {
            let _ = sys::cuGraphExecDestroy(self.executable);
            let _ = sys::cuGraphDestroy(self.graph);
        }
    }
}
