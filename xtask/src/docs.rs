//! `cargo xtask docs`: generates the pages under `docs` that come from tables in the code.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use lora_core::{Code, Stage};

/// Writes the pages into the checkout.
///
/// # Errors
/// If a file cannot be written.
pub fn write() -> anyhow::Result<()> {
    let path = page("errors.md");
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    fs::write(&path, errors_page()).with_context(|| path.display().to_string())
}

fn page(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name)
}

const INTRODUCTION: &str = "\
# What is refused, and why

<!-- Written by `cargo xtask docs` from the tables in crates/lora-core/src/rules; change those. -->

loramux refuses what it cannot do exactly, instead of doing something similar. A refusal says which setting,
tensor or file is wrong, what was found there, what is allowed and what to do, and ends with the code of the rule in
brackets. Codes are stable: programs may match on them. An error lists every rule that is broken, and
an adapter or request that is refused does not affect any other.

Rules are checked as early as they can be, and below they stand in that order.
";

/// `docs/errors.md`: every code with its meaning and remedy, in one table for each stage.
fn errors_page() -> String {
    let mut page = INTRODUCTION.to_owned();
    for stage in Stage::ALL {
        let (title, text) = heading(stage);
        page += &format!("\n## {title}\n\nStage `{stage}`: {text}\n\n");
        page += "| code | what is refused | what to do |\n|---|---|---|\n";
        for code in Code::all().filter(|code| code.stage() == stage) {
            page += &format!("| `{code}` | {} | {} |\n", code.meaning(), code.remedy());
        }
    }
    page
}

fn heading(stage: Stage) -> (&'static str, &'static str) {
    match stage {
        Stage::Config => {
            ("Configuration", "values by themselves, before a model or an adapter is read.")
        }
        Stage::Construction => {
            ("Construction", "the configuration and the model together, when an engine is built.")
        }
        Stage::Load => (
            "Adapters",
            "an adapter's files, and the adapter against the model and the configuration, when it \
             is loaded. Only the requests for that adapter fail.",
        ),
        Stage::Runtime => {
            ("Requests and steps", "a request when it is made, or a step before it runs.")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_errors_is_up_to_date() {
        let written = fs::read_to_string(page("errors.md")).unwrap_or_default();
        assert!(
            written == errors_page(),
            "docs/errors.md differs from the tables in crates/lora-core/src/rules: run `cargo xtask docs`"
        );
    }

    #[test]
    fn every_code_has_one_row() {
        let page = errors_page();
        for code in Code::all() {
            assert_eq!(page.matches(&format!("\n| `{code}` |")).count(), 1, "{code}");
        }
    }
}
