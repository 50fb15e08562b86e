//! Plain-text tables.

use comfy_table::presets::{NOTHING, UTF8_FULL_CONDENSED};
use comfy_table::{ColumnConstraint, ContentArrangement, Table, Width};

/// Width of a table that is not shown on a terminal, in columns.
const WIDTH: u16 = 100;

/// Maximum width of the first column, in percent of the table's.
const MAX_FIRST_COLUMN: u16 = 25;

/// An empty table with borders, as wide as the terminal, with a narrow first column.
pub(crate) fn framed(headings: &[&str], live: bool) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(headings.iter().copied());
    if let Some(first) = table.column_mut(0) {
        first.set_constraint(ColumnConstraint::UpperBoundary(Width::Percentage(MAX_FIRST_COLUMN)));
    }
    if !live || table.width().is_none() {
        table.set_width(WIDTH);
    }
    table
}

/// An empty table of aligned columns without borders.
pub(crate) fn columns() -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table
}
