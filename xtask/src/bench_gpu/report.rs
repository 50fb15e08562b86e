//! Rows of the table, with floors.

use comfy_table::Table;
use serde::Serialize;

use super::{Case, layer};

/// Bytes a second that floors are reckoned with: about what a copy moves on an H100.
const BYTES_PER_SECOND: f64 = 3.0e12;

/// Medians in microseconds a layer.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measured {
    /// The base products.
    pub base: f32,
    /// The same with adapters.
    pub with_adapters: f32,
}

/// One case with its numbers, all in microseconds a layer.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    rank: usize,
    tokens: usize,
    adapters: usize,
    /// Time to read every factor once.
    floor: f64,
    #[serde(flatten)]
    measured: Measured,
    adds: f32,
    vllm_adds: Option<f32>,
    sglang_adds: Option<f32>,
    target: f32,
}

impl Row {
    /// A case as it was measured.
    pub fn new(case: &Case, measured: Measured) -> Self {
        let bytes = 2 * case.rank * case.adapters * layer::widths();
        Self {
            rank: case.rank,
            tokens: case.tokens,
            adapters: case.adapters,
            floor: bytes as f64 / BYTES_PER_SECOND * 1e6,
            adds: measured.with_adapters - measured.base,
            measured,
            vllm_adds: case.vllm,
            sglang_adds: case.sglang,
            target: case.target,
        }
    }
}

/// The table for people.
pub fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.set_header([
        "rank",
        "tokens",
        "adapters",
        "base us",
        "adds us",
        "adds %",
        "floor us",
        "vLLM adds",
        "SGLang adds",
        "at most",
    ]);
    for row in rows {
        let peer = |adds: Option<f32>| adds.map_or_else(String::new, |us| format!("{us:.0}"));
        table.add_row([
            row.rank.to_string(),
            row.tokens.to_string(),
            row.adapters.to_string(),
            format!("{:.1}", row.measured.base),
            format!("{:.1}", row.adds),
            format!("{:.1}", row.adds / row.measured.base * 100.0),
            format!("{:.1}", row.floor),
            peer(row.vllm_adds),
            peer(row.sglang_adds),
            format!("{:.0}", row.target),
        ]);
    }
    table
}
