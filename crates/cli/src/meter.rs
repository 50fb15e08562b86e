//! Token counts and throughput of a running batch.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use loramux_engine::Update;

/// Tokens and times of one batch.
///
/// Prefill lasts until the last output gets its first token; later steps only decode. With more requests than fit the
/// batch at once, the prefill time includes decode steps of earlier requests.
pub(crate) struct Meter {
    start: Instant,
    started: HashSet<(usize, usize)>,
    tokens: usize,
    finished: usize,
    prefill: Mark,
    last: Duration,
}

/// A point in time, and the tokens generated until then.
#[derive(Clone, Copy, Default)]
struct Mark {
    time: Duration,
    tokens: usize,
}

impl Meter {
    /// Starts the clock.
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

    /// Counts an update of the engine.
    pub fn update(&mut self, update: &Update<'_>) {
        self.last = self.start.elapsed();
        if update.finished {
            self.finished += 1;
            // A batch may be endless, so forget finished outputs.
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

    /// Finished outputs.
    pub fn finished(&self) -> usize {
        self.finished
    }

    /// Time from the start to the last update.
    pub fn elapsed(&self) -> Duration {
        self.last
    }

    /// Time from the start until every output had its first token.
    pub fn prefill_time(&self) -> Duration {
        self.prefill.time
    }

    /// Generated tokens per second, prefill included.
    pub fn tokens_per_second(&self) -> f64 {
        rate(self.tokens, self.last)
    }

    /// Generated tokens per second after prefill.
    pub fn decode_tokens_per_second(&self) -> f64 {
        rate(self.tokens - self.prefill.tokens, self.last.saturating_sub(self.prefill.time))
    }
}

/// `count` per second; 0 if no time has passed.
pub(crate) fn rate(count: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_and_finished_outputs_are_counted_apart() {
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
