//! Progress bars, drawn on standard error if it is a terminal.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::meter::Meter;

/// Characters to show of the end of a growing answer, so that it fits beside a label in 80 columns.
const TAIL: usize = 60;

/// A bar of `length` steps, hidden unless `live`.
fn bar(length: usize, live: bool, template: &str) -> ProgressBar {
    let target = if live { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    ProgressBar::with_draw_target(Some(length as u64), target).with_style(style(template))
}

/// The style of a template; a template with a mistake falls back to the plain one.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A bar for loading a model; its length is set by the first report.
pub(crate) fn loading_bar(live: bool) -> ProgressBar {
    bar(0, live, "loading {wide_bar} {pos}/{len} layers")
}

/// A bar for a batch of answers; its length grows with the requests that are read.
pub(crate) fn batch_bar(live: bool) -> ProgressBar {
    bar(0, live, "answers {wide_bar} {pos}/{len}  {msg}")
}

/// Updates `bar` to the state of a batch.
pub(crate) fn show(bar: &ProgressBar, meter: &Meter) {
    bar.set_position(meter.finished() as u64);
    let (tokens, rate) = (meter.tokens(), meter.tokens_per_second());
    bar.set_message(format!("{tokens} tokens, {rate:.0} tokens/s"));
}

/// One line for each answer, which shows the end of its text while it is generated.
pub(crate) struct LiveLines {
    lines: Vec<(ProgressBar, String)>,
    all: MultiProgress,
}

impl LiveLines {
    /// Lines headed by `labels`.
    pub fn new(labels: impl Iterator<Item = String>, live: bool) -> Self {
        let target = if live { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let all = MultiProgress::with_draw_target(target);
        let style = style("{prefix} {wide_msg}");
        let line = |label| {
            let bar = ProgressBar::no_length().with_style(style.clone()).with_prefix(label);
            (all.add(bar), String::new())
        };
        let lines = labels.map(line).collect();
        Self { lines, all }
    }

    /// Appends to the text of one line.
    pub fn push(&mut self, line: usize, piece: &str) {
        let Some((bar, text)) = self.lines.get_mut(line) else { return };
        text.extend(piece.chars().map(|c| if c.is_control() { ' ' } else { c }));
        if let Some((start, _)) = text.char_indices().rev().nth(TAIL) {
            text.drain(..start);
        }
        bar.set_message(text.clone());
    }

    /// Removes all lines.
    pub fn clear(self) {
        // Only drawing can fail, and nothing depends on it.
        let _ = self.all.clear();
    }
}
