//! Results of `bench-load`, as a table and as JSON.

use comfy_table::{Cell, CellAlignment, Table, presets::ASCII_MARKDOWN};
use serde::Serialize;

/// The results of one layout.
#[derive(Serialize)]
pub struct Row {
    /// Name of the layout.
    pub layout: &'static str,
    /// Bytes of the weight file.
    pub file_bytes: u64,
    /// Median seconds of a plain read of the file into memory.
    pub read_s: f64,
    /// Median seconds of a load: read, checked, hashed, and laid out by expert.
    pub load_s: f64,
    /// Peak resident memory of a loading process.
    pub peak_bytes: u64,
}

impl Row {
    /// Speed of loading relative to a plain read.
    fn of_read(&self) -> f64 {
        self.read_s / self.load_s
    }

    /// Peak memory relative to the size of the file.
    fn peak_of_file(&self) -> f64 {
        self.peak_bytes as f64 / self.file_bytes as f64
    }

    /// A one-line summary.
    pub fn line(&self) -> String {
        format!(
            "{}: read {:.2} s, loaded {:.2} s, peak memory {:.2}x the file",
            self.layout,
            self.read_s,
            self.load_s,
            self.peak_of_file()
        )
    }
}

/// The rows as a Markdown table.
pub fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header([
        "layout",
        "file GB",
        "plain read s",
        "load s",
        "of plain read",
        "peak / file",
    ]);
    for row in rows {
        let cells = [
            format!("{:.2}", row.file_bytes as f64 / 1e9),
            format!("{:.2}", row.read_s),
            format!("{:.2}", row.load_s),
            format!("{:.0}%", 100.0 * row.of_read()),
            format!("{:.2}", row.peak_of_file()),
        ];
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        table.add_row(std::iter::once(Cell::new(row.layout)).chain(cells.map(right)));
    }
    table
}
