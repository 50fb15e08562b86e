//! The table of `docs/adapters.md`: each of its examples is served or refused as stated.

use std::fs;
use std::path::Path;

use loramux::Exit;
use loramux_tests::{field_model, fixtures_dir};

use super::support::loramux;

/// A row of the table.
struct Row {
    example: String,
    /// What happens to it here.
    here: String,
}

fn rows() -> Vec<Row> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/adapters.md");
    let page = fs::read_to_string(page).unwrap();
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let row = |line: &str| match &cells(line)[..] {
        [_, _, _, example, here, _] => {
            Some(Row { example: quoted(example).pop()?, here: here.clone() })
        }
        _ => None,
    };
    page.lines().filter(|line| line.starts_with('|')).filter_map(row).collect()
}

/// What stands in backticks.
fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The model of an adapter, which the name of its folder begins with; inputs to refuse are for `llama`.
fn model(example: &str) -> String {
    let name = example.rsplit('/').next().unwrap();
    let refused = example.contains("refusals/");
    let model = if refused { "llama" } else { name.split('.').next().unwrap() };
    field_model(model).display().to_string()
}

#[test]
fn every_example_is_served_or_refused_as_the_table_says() {
    let rows = rows();
    assert!(rows.len() > 30, "{} rows", rows.len());
    for Row { example, here } in rows {
        let adapter = fixtures_dir().join(&example).display().to_string();
        let outcome = loramux(&["inspect", &adapter, "--model", &model(&example)], b"");
        let output = outcome.stdout + &outcome.stderr;
        if here.starts_with("served") {
            assert_eq!(outcome.exit, Exit::Fine, "{example}: {output}");
            continue;
        }
        assert!(here.starts_with("refused"), "{example}: {here}");
        assert_ne!(outcome.exit, Exit::Fine, "{example}: {output}");
        let words = quoted(&here);
        assert!(!words.is_empty(), "{example}: no word of the refusal");
        for word in words {
            assert!(output.contains(&word), "{example}, without `{word}`: {output}");
        }
    }
}
