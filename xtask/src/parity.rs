//! Running the tests of the CUDA backend with a report of how far its results are from the formulas.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

/// The environment variable that names the file to which the tests write errors
/// (`REPORT_VARIABLE` of `polylora-tests`).
const ERRORS_VARIABLE: &str = "POLYLORA_PARITY_REPORT";

/// Numbers of tests.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Counts {
    passed: u64,
    failed: u64,
}

/// Runs the tests and writes the report, whether or not they pass.
///
/// # Errors
/// If there is no GPU, a test fails, or the report cannot be written.
pub fn run(mut tests: Command, report: &Path) -> Result<()> {
    let [device, driver] = device()?;
    let folder = tempfile::tempdir()?;
    let errors = folder.path().join("errors.json");
    let mut child = tests.env(ERRORS_VARIABLE, &errors).stdout(Stdio::piped()).spawn()?;
    let output = child.stdout.take().context("the tests have no output")?;
    let mut counts = Counts::default();
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        counts = parse_counts(&line).unwrap_or(counts);
    }
    let status = child.wait()?;
    let mut content = json!({
        "device": device,
        "driver": driver,
        "kernels": lora_cuda::kernels::version(),
        "tests": {"passed": counts.passed, "failed": counts.failed},
    });
    if let (Value::Object(content), Some(errors)) = (&mut content, read(&errors)?) {
        content.extend(errors);
    }
    let text = serde_json::to_string_pretty(&content)? + "\n";
    fs::write(report, text).with_context(|| report.display().to_string())?;
    println!("errors are in {}", report.display());
    ensure!(status.success(), "the tests failed");
    Ok(())
}

/// What the tests wrote, if they came so far.
fn read(errors: &Path) -> Result<Option<Map<String, Value>>> {
    if !errors.is_file() {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&fs::read(errors)?)?))
}

/// Name and driver of the first GPU.
fn device() -> Result<[String; 2]> {
    let query = ["--query-gpu=name,driver_version", "--format=csv,noheader"];
    let output =
        Command::new("nvidia-smi").args(query).output().context("cannot run nvidia-smi")?;
    ensure!(output.status.success(), "nvidia-smi finds no GPU");
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default();
    let (name, driver) = line.split_once(", ").context("nvidia-smi named no GPU")?;
    Ok([name.to_owned(), driver.to_owned()])
}

/// The numbers in the last line of a test program.
fn parse_counts(line: &str) -> Option<Counts> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |what: &str| {
        let part = counts.split("; ").find_map(|part| part.strip_suffix(what));
        part?.trim().parse().ok()
    };
    Some(Counts { passed: number("passed")?, failed: number("failed")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_the_tests_is_understood() {
        let line = "test result: FAILED. 275 passed; 2 failed; 0 ignored; 0 measured; 3 filtered \
                    out; finished in 0.05s";
        assert_eq!(parse_counts(line), Some(Counts { passed: 275, failed: 2 }));
        assert_eq!(parse_counts("test suite_f32::rows ... ok"), None);
    }
}
