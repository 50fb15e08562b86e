//! Results of `bench-gpu` on one layer, as a table and as JSON.

use comfy_table::Table;
use serde::Serialize;

use super::{Case, layer};

/// Memory bandwidth that floors assume: about what a copy reaches on an H100.
const BYTES_PER_SECOND: f64 = 3.0e12;

/// Medians in microseconds a layer.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measured {
    /// The base layer alone.
    pub base: f64,
    /// The base layer with adapters.
    pub with_adapters: f64,
}

/// One case and its times, all in microseconds a layer.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    rank: usize,
    tokens: usize,
    adapters: usize,
    /// Time to read every LoRA factor once at [`BYTES_PER_SECOND`].
    floor: f64,
    #[serde(flatten)]
    measured: Measured,
    adds: f64,
    vllm_adds: Option<f64>,
    sglang_adds: Option<f64>,
    target: f64,
}

impl Row {
    /// The row of a measured case.
    pub fn new(case: &Case, measured: Measured) -> Self {
        let bytes = 2 * case.rank * case.adapters * layer::widths();
        Self {
            rank: case.rank,
            tokens: case.tokens,
            adapters: case.adapters,
            floor: bytes as f64 / BYTES_PER_SECOND * 1e6,
            adds: measured.with_adapters - measured.base,
            measured,
            vllm_adds: case.peers.vllm,
            sglang_adds: case.peers.sglang,
            target: case.target,
        }
    }
}

/// The rows as a table.
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
        let peer = |adds: Option<f64>| adds.map_or_else(String::new, |us| format!("{us:.0}"));
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
