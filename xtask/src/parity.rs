//! `cargo xtask test-gpu --report`: runs the tests of the CUDA backend and reports the largest error of each op.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

/// The environment variable with the file that the tests write errors to (`REPORT_VARIABLE` of `loramux-tests`).
const ERRORS_VARIABLE: &str = "LORAMUX_PARITY_REPORT";

/// Counts of tests.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Counts {
    passed: u64,
    failed: u64,
}

impl Counts {
    fn plus(self, other: Self) -> Self {
        Self { passed: self.passed + other.passed, failed: self.failed + other.failed }
    }
}

/// Runs the test programs one after another and writes the report, whether or not they pass.
///
/// # Errors
/// If no GPU is present, a test fails, or the report cannot be written.
pub fn run(programs: impl IntoIterator<Item = Command>, report: &Path) -> Result<()> {
    let [device, driver] = device()?;
    let folder = tempfile::tempdir()?;
    let errors = folder.path().join("errors.json");
    let (mut counts, mut passed) = (Counts::default(), true);
    for mut program in programs {
        let (of_program, success) = run_one(program.env(ERRORS_VARIABLE, &errors))?;
        counts = counts.plus(of_program);
        passed &= success;
    }
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
    ensure!(passed, "the tests failed");
    Ok(())
}

/// Runs a test program, echoes its output, and returns its counts and whether it succeeded.
fn run_one(program: &mut Command) -> Result<(Counts, bool)> {
    let mut child = program.stdout(Stdio::piped()).spawn()?;
    let output = child.stdout.take().context("the tests have no output")?;
    let mut counts = Counts::default();
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        counts = counts.plus(parse_counts(&line).unwrap_or_default());
    }
    Ok((counts, child.wait()?.success()))
}

/// The errors that the tests wrote; `None` if they ended before that.
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

/// Parses the last line of a test program's output.
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

    #[test]
    fn the_numbers_of_a_program_are_added_up() {
        let mut program = Command::new("sh");
        program.args(["-c", "echo 'test result: ok. 3 passed; 0 failed; 5 ignored'; exit 1"]);
        let (counts, success) = run_one(&mut program).unwrap();
        assert_eq!((counts, success), (Counts { passed: 3, failed: 0 }, false));
        let more = counts.plus(Counts { passed: 5, failed: 1 });
        assert_eq!(more, Counts { passed: 8, failed: 1 });
    }
}
