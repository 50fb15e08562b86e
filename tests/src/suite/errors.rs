//! The largest errors of each op in a run, for comparing devices.
//!
//! If the environment variable [`REPORT_VARIABLE`] names a file, it is rewritten after each property, as
//! the test harness does not signal when the last one has ended.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

/// The environment variable with the path of the report.
pub const REPORT_VARIABLE: &str = "LORAMUX_PARITY_REPORT";

/// The largest errors of an op.
#[derive(Clone, Copy, PartialEq, Default, Debug, Serialize)]
pub struct Largest {
    /// `|found - expected|` relative to the largest expected magnitude of the row.
    pub relative: f64,
    /// `|found - expected|` relative to the tolerance for the element.
    pub of_allowed: f64,
    /// Number of matrices that were compared.
    pub comparisons: u64,
}

/// The comparison of a model's logits with those of transformers.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ModelErrors {
    /// Its name.
    pub model: String,
    /// Dtype of the activations.
    pub dtype: String,
    /// Number of prompts.
    pub cases: usize,
    /// The largest relative error of a prompt's logits; `None`: only tokens were compared.
    pub worst_relative_logit_error: Option<f32>,
}

/// The results of a run so far.
#[derive(Default, Serialize)]
struct Report {
    /// By op and dtype of the result.
    ops: BTreeMap<String, BTreeMap<String, Largest>>,
    /// Number of matrices that were bitwise equal as required, by comparison.
    exact: BTreeMap<String, u64>,
    models: Vec<ModelErrors>,
}

static RUN: Mutex<Report> =
    Mutex::new(Report { ops: BTreeMap::new(), exact: BTreeMap::new(), models: Vec::new() });

impl Largest {
    /// The larger of each.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            relative: self.relative.max(other.relative),
            of_allowed: self.of_allowed.max(other.of_allowed),
            comparisons: self.comparisons + other.comparisons,
        }
    }
}

/// The name of a comparison, without row and slice numbers.
fn name(op: &str) -> &str {
    op.split([',', '[']).next().unwrap_or(op).trim_end()
}

fn run() -> MutexGuard<'static, Report> {
    // Results of a failed test are still valid.
    RUN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Records the errors of one comparison.
pub(super) fn record(op: &str, dtype: &str, errors: Largest) {
    let mut run = run();
    let largest = run.ops.entry(name(op).to_owned()).or_default();
    let largest = largest.entry(dtype.to_owned()).or_default();
    *largest = largest.and(errors);
}

/// Records a result that was bitwise equal.
pub(super) fn record_exact(what: &str) {
    *run().exact.entry(name(what).to_owned()).or_default() += 1;
}

/// Records the comparison of a model, and writes the report.
///
/// # Panics
/// If the report cannot be written.
pub fn record_model(errors: ModelErrors) {
    run().models.push(errors);
    write_report();
}

/// Writes the report, if it is requested.
///
/// # Panics
/// If it cannot be written.
pub fn write_report() {
    let Some(path) = std::env::var_os(REPORT_VARIABLE).map(PathBuf::from) else { return };
    let run = run();
    // Written to a temporary file and renamed, so that it is complete even if the run is killed.
    let unfinished = path.with_extension("unfinished");
    write(&unfinished, &run)
        .and_then(|()| std::fs::rename(&unfinished, &path))
        .unwrap_or_else(|error| panic!("{}: {error}, named by {REPORT_VARIABLE}", path.display()));
}

fn write(path: &Path, report: &Report) -> std::io::Result<()> {
    std::fs::write(path, serde_json::to_vec_pretty(report)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_without_numbers_and_errors_grow() {
        assert_eq!(name("lora_add, row 3 slice 0 slot 1"), "lora_add");
        assert_eq!(name("linear of rows [0, 2] alone"), "linear of rows");
        let one = Largest { relative: 0.5, of_allowed: 0.1, comparisons: 1 };
        let two = Largest { relative: 0.2, of_allowed: 0.3, comparisons: 1 };
        let both = Largest { relative: 0.5, of_allowed: 0.3, comparisons: 2 };
        assert_eq!(one.and(two), both);
    }

    #[test]
    fn a_report_holds_what_was_recorded() {
        record("test op, row 1", "float32", Largest { comparisons: 1, ..Largest::default() });
        record("test op, row 2", "float32", Largest { relative: 0.25, ..Largest::default() });
        record_exact("test ids [3]");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        write(&path, &run()).unwrap();
        let report: serde_json::Value =
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let of_op = &report["ops"]["test op"]["float32"];
        assert_eq!(
            (of_op["relative"].as_f64(), of_op["comparisons"].as_u64()),
            (Some(0.25), Some(1))
        );
        assert_eq!(report["exact"]["test ids"], 1);
    }
}
