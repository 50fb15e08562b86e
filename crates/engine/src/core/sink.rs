//! Receivers of sequence events.

use std::fmt;

use crossbeam_channel::Sender;
use tokio::sync::mpsc::UnboundedSender;

use super::event::Event;

/// Receives the events of sequences. It is called on the engine thread for every token of every
/// sequence, so it must not block.
pub trait EventSink: fmt::Debug + Send + Sync {
    /// Delivers an event. Returns `false` if the receiver is gone, in which case the engine ends the
    /// sequence.
    fn send(&self, sequence: u64, event: Event) -> bool;
}

/// For receivers on threads.
impl EventSink for Sender<(u64, Event)> {
    fn send(&self, sequence: u64, event: Event) -> bool {
        Sender::send(self, (sequence, event)).is_ok()
    }
}

/// For receivers in async tasks.
impl EventSink for UnboundedSender<(u64, Event)> {
    fn send(&self, sequence: u64, event: Event) -> bool {
        UnboundedSender::send(self, (sequence, event)).is_ok()
    }
}
