//! Tables for people.

use comfy_table::presets::{NOTHING, UTF8_FULL_CONDENSED};
use comfy_table::{ColumnConstraint, ContentArrangement, Table, Width};

/// Columns of a table that is not seen on a terminal.
const WIDTH: u16 = 100;

/// Most of a table's width that its first column takes, in percent.
const FIRST_COLUMN: u16 = 25;

/// An empty table with borders and these headings, as wide as the terminal if there is one. Most
/// of the width is left to the columns after the first.
pub(crate) fn framed(headings: &[&str], live: bool) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(headings.iter().copied());
    if let Some(first) = table.column_mut(0) {
        first.set_constraint(ColumnConstraint::UpperBoundary(Width::Percentage(FIRST_COLUMN)));
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
