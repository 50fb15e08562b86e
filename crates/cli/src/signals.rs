//! Signals that ask a batch to end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::exit::Exit;

/// From its making on, the first SIGINT or SIGTERM is only noted here; the second ends the process
/// at once with the same exit code. Before, signals do what they do by default.
pub(crate) struct Signals {
    noted: [(Exit, Arc<AtomicBool>); 2],
}

impl Signals {
    /// Starts to note signals.
    ///
    /// # Errors
    /// That of the system.
    pub fn note() -> io::Result<Self> {
        let any = Arc::new(AtomicBool::new(false));
        let note = |signal, exit: Exit| {
            let noted = Arc::new(AtomicBool::new(false));
            // Actions run in the order in which they were registered.
            flag::register_conditional_shutdown(signal, exit as i32, any.clone())?;
            flag::register(signal, any.clone())?;
            flag::register(signal, noted.clone())?;
            io::Result::Ok((exit, noted))
        };
        Ok(Self { noted: [note(SIGINT, Exit::Interrupted)?, note(SIGTERM, Exit::Terminated)?] })
    }

    /// The exit code of the signal that came, if one did.
    pub fn caught(&self) -> Option<Exit> {
        let caught = self.noted.iter().find(|(_, noted)| noted.load(Ordering::Relaxed));
        caught.map(|(exit, _)| *exit)
    }
}
