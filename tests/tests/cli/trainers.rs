//! The table of `docs/adapters.md`: each of its examples is served or refused as stated.

use std::fs;
use std::path::Path;

use loramux::Exit;
use loramux_tests::{field_model, fixtures_dir};

use super::support::loramux;

/// A row of the table.
struct Row {
    example: String,
    /// The last column: `served`, or `refused` with words of the message.
    result: String,
}

fn rows() -> Vec<Row> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/adapters.md");
    let page = fs::read_to_string(page).unwrap();
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let row = |line: &str| match &cells(line)[..] {
        [_, _, _, example, result, _] => {
            Some(Row { example: quoted(example).pop()?, result: result.clone() })
        }
        _ => None,
    };
    page.lines().filter(|line| line.starts_with('|')).filter_map(row).collect()
}

/// The parts in backticks.
fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The model of an adapter: the prefix of its folder's name, or `llama` for inputs that are refused.
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
    for Row { example, result } in rows {
        let adapter = fixtures_dir().join(&example).display().to_string();
        let outcome = loramux(&["inspect", &adapter, "--model", &model(&example)], b"");
        let output = outcome.stdout + &outcome.stderr;
        if result.starts_with("served") {
            assert_eq!(outcome.exit, Exit::Fine, "{example}: {output}");
            continue;
        }
        assert!(result.starts_with("refused"), "{example}: {result}");
        assert_ne!(outcome.exit, Exit::Fine, "{example}: {output}");
        let words = quoted(&result);
        assert!(!words.is_empty(), "{example}: the table quotes no words of the message");
        for word in words {
            assert!(output.contains(&word), "{example}, without `{word}`: {output}");
        }
    }
}
