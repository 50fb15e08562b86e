//! Where the events of sequences go.

use std::fmt;

use crossbeam_channel::Sender;
use futures_channel::mpsc::UnboundedSender;

use super::message::Event;

/// Takes the events of sequences. It is called on the engine thread, for every token of every
/// sequence, so it must return at once.
pub trait EventSink: fmt::Debug + Send + Sync {
    /// Takes an event of a sequence. `false`: no one listens any more, and the sequence may end.
    fn send(&self, sequence: u64, event: Event) -> bool;
}

/// For threads that wait.
impl EventSink for Sender<(u64, Event)> {
    fn send(&self, sequence: u64, event: Event) -> bool {
        Sender::send(self, (sequence, event)).is_ok()
    }
}

/// For tasks of an async runtime.
impl EventSink for UnboundedSender<(u64, Event)> {
    fn send(&self, sequence: u64, event: Event) -> bool {
        self.unbounded_send((sequence, event)).is_ok()
    }
}
