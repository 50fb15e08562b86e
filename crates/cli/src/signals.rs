//! SIGINT and SIGTERM during a batch.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::exit::Exit;

/// Signal handlers: the first SIGINT or SIGTERM is recorded for [`Signals::caught`]; the second ends the process at
/// once with the signal's exit code.
pub(crate) struct Signals {
    received: [(Exit, Arc<AtomicBool>); 2],
}

impl Signals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// That of the system.
    pub fn install() -> io::Result<Self> {
        let any = Arc::new(AtomicBool::new(false));
        let install = |signal, exit: Exit| {
            let received = Arc::new(AtomicBool::new(false));
            // Actions run in the order of registration, so `any` is still false at the first signal.
            flag::register_conditional_shutdown(signal, exit as i32, any.clone())?;
            flag::register(signal, any.clone())?;
            flag::register(signal, received.clone())?;
            io::Result::Ok((exit, received))
        };
        let received = [install(SIGINT, Exit::Interrupted)?, install(SIGTERM, Exit::Terminated)?];
        Ok(Self { received })
    }

    /// The exit code of the received signal, if any.
    pub fn caught(&self) -> Option<Exit> {
        let caught = self.received.iter().find(|(_, received)| received.load(Ordering::Relaxed));
        caught.map(|(exit, _)| *exit)
    }
}
