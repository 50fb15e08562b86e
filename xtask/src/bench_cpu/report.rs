//! Results of `bench-cpu`, as a table and as JSON.

use comfy_table::{Cell, CellAlignment, Table, presets::ASCII_MARKDOWN};
use serde::Serialize;

/// The results of one configuration.
#[derive(Serialize)]
pub struct Row {
    /// Model.
    pub model: String,
    /// Sequences in the batch.
    pub batch: usize,
    /// Different adapters in the batch.
    pub adapters: usize,
    /// Prompt tokens per second until every sequence had its first token.
    pub prefill_tokens_per_s: f64,
    /// Median milliseconds of a decode step.
    pub step_ms: f64,
    /// Tokens per second of the whole batch at that step time.
    pub decode_tokens_per_s: f64,
    /// Bytes of weights that a decode step reads, adapters included.
    pub step_bytes: u64,
    /// `step_bytes` divided by the step time.
    pub read_gb_per_s: f64,
    /// Bandwidth of a plain read of memory, measured just before.
    pub plain_read_gb_per_s: f64,
}

impl Row {
    /// A one-line summary.
    pub fn line(&self) -> String {
        format!(
            "{} batch {} adapters {}: prefill {:.0} tok/s, decode {:.1} tok/s ({:.1} ms a step)",
            self.model,
            self.batch,
            self.adapters,
            self.prefill_tokens_per_s,
            self.decode_tokens_per_s,
            self.step_ms
        )
    }
}

/// The rows as a Markdown table.
pub fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header([
        "model",
        "batch",
        "adapters",
        "prefill tok/s",
        "ms/step",
        "decode tok/s",
        "GB/s",
        "plain read GB/s",
        "of it",
    ]);
    for row in rows {
        let cells = [
            row.batch.to_string(),
            row.adapters.to_string(),
            format!("{:.0}", row.prefill_tokens_per_s),
            format!("{:.1}", row.step_ms),
            format!("{:.1}", row.decode_tokens_per_s),
            format!("{:.1}", row.read_gb_per_s),
            format!("{:.1}", row.plain_read_gb_per_s),
            format!("{:.0}%", 100.0 * row.read_gb_per_s / row.plain_read_gb_per_s),
        ];
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        table.add_row(std::iter::once(Cell::new(&row.model)).chain(cells.map(right)));
    }
    table
}
