//! Counting tokens while a batch runs.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use loramux_engine::Update;

/// Tokens and times of one call of the engine.
///
/// The time to the last of the first tokens is that of prefill: from then on, every step decodes
/// only. With more requests than the batch takes at once, it also holds steps that decode.
pub(crate) struct Meter {
    start: Instant,
    started: HashSet<(usize, usize)>,
    tokens: usize,
    finished: usize,
    prefill: Mark,
    last: Duration,
}

/// A moment of the call.
#[derive(Clone, Copy, Default)]
struct Mark {
    time: Duration,
    tokens: usize,
}

impl Meter {
    /// A meter whose time runs from now on.
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            started: HashSet::new(),
            tokens: 0,
            finished: 0,
            prefill: Mark::default(),
            last: Duration::ZERO,
        }
    }

    /// Takes in what the engine reports.
    pub fn update(&mut self, update: &Update<'_>) {
        self.last = self.start.elapsed();
        if update.finished {
            self.finished += 1;
            // Batches may be endless.
            self.started.remove(&(update.request, update.output));
            return;
        }
        self.tokens += 1;
        if self.started.insert((update.request, update.output)) {
            self.prefill = Mark { time: self.last, tokens: self.tokens };
        }
    }

    /// Tokens generated so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Outputs that are complete.
    pub fn finished(&self) -> usize {
        self.finished
    }

    /// From the start to the last report.
    pub fn elapsed(&self) -> Duration {
        self.last
    }

    /// From the start to the first token of the output that was last to get one.
    pub fn prefill_time(&self) -> Duration {
        self.prefill.time
    }

    /// Tokens generated a second, prefill included.
    pub fn tokens_per_second(&self) -> f64 {
        rate(self.tokens, self.last)
    }

    /// Tokens generated a second after prefill.
    pub fn decode_tokens_per_second(&self) -> f64 {
        rate(self.tokens - self.prefill.tokens, self.last.saturating_sub(self.prefill.time))
    }
}

/// `count` a second; 0 where no time has passed.
pub(crate) fn rate(count: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_counted_apart_from_the_reports_of_complete_outputs() {
        let mut meter = Meter::start();
        for (output, finished) in [(0, false), (1, false), (0, false), (0, true), (1, true)] {
            meter.update(&Update { request: 0, output, piece: "", tokens: 1, finished });
        }
        assert_eq!((meter.tokens(), meter.finished()), (3, 2));
        assert_eq!(meter.prefill.tokens, 2);
        assert!(meter.prefill_time() <= meter.elapsed());
        assert_eq!(rate(5, Duration::ZERO), 0.0);
        assert_eq!(rate(5, Duration::from_secs(2)), 2.5);
    }
}
