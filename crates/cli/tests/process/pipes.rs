//! Lines are read and answered one by one, and a closed pipe stops the work.

use std::io::{BufRead, Write};
use std::process::{Command, Stdio};

use super::program::{Running, SHORT, generate, ids, long, run, text};

#[test]
fn each_line_is_answered_when_it_is_done_while_the_input_stays_open() {
    let mut running = Running::start(&mut generate(&["--requests", "-"]));
    for _ in 0..3 {
        running.ask(SHORT);
        assert_eq!(running.answer()["id"], "short");
    }
    drop(running.stdin.take());
    let (code, rest, stderr) = running.end();
    assert_eq!((code, rest.as_str()), (Some(0), ""), "{stderr}");
    assert!(stderr.contains("summary: 3 answers, 0 failed"), "{stderr}");
}

#[test]
fn a_reader_that_has_enough_stops_the_work() {
    let mut running = Running::start(&mut generate(&["--requests", "-"]));
    running.wait_for("sampling: ");
    drop(running.stdout.take());
    running.ask(&format!("{SHORT}\n{}", long()));
    let (code, _, stderr) = running.end();
    assert_eq!(code, Some(141), "{stderr}");
    assert!(stderr.contains("the reader of the answers closed the pipe"), "{stderr}");
    assert!(!stderr.contains("panicked") && stderr.contains("not answered: line 1"), "{stderr}");
}

#[test]
fn a_fifo_is_read_as_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("requests");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let mut running = Running::start(&mut generate(&["--requests", fifo.to_str().unwrap()]));
    let mut requests = std::fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    for _ in 0..2 {
        writeln!(requests, "{SHORT}").unwrap();
        assert_eq!(running.answer()["id"], "short");
    }
    drop(requests);
    assert_eq!(running.end().0, Some(0));
}

#[test]
fn a_single_prompt_ends_when_nobody_reads_its_text() {
    let words = ["--prompt", "x", "--max-tokens", "500", "--ignore-eos"];
    let mut command = generate(&words);
    let mut running = Running::start(&mut command);
    drop(running.stdout.take());
    let (code, _, stderr) = running.end();
    assert_eq!(code, Some(141), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[test]
fn more_lines_than_are_held_at_a_time_are_answered_in_order() {
    let lines: String =
        (0..20).map(|id| SHORT.replace("\"short\"", &id.to_string()) + "\n").collect();
    let output = run(&mut generate(&["--requests", "-", "--max-batch-size", "2"]), &lines);
    let expected: Vec<String> = (0..20).map(|id: i32| id.to_string()).collect();
    assert_eq!((output.status.code(), ids(&text(&output.stdout))), (Some(0), expected));
}

#[test]
fn a_line_over_the_bound_is_an_error_of_that_line() {
    let mut running = Running::start(&mut generate(&["--requests", "-"]));
    let stdin = running.stdin.as_mut().unwrap();
    stdin.write_all(b"{\"prompt\": \"").unwrap();
    let piece = vec![b'x'; 1 << 20];
    for _ in 0..17 {
        stdin.write_all(&piece).unwrap();
    }
    stdin.write_all(b"\"}\n").unwrap();
    running.ask(SHORT);
    let error = running.answer();
    assert!(error["error"].as_str().unwrap().contains("16777216 bytes"), "{error}");
    assert_eq!(running.answer()["id"], "short");
    drop(running.stdin.take());
    let (code, _, stderr) = running.end();
    assert_eq!(code, Some(1));
    assert!(stderr.contains("failed: line 1 (id null): "), "{stderr}");
}

#[test]
fn a_file_without_lines_ends_the_run_and_not_the_memory() {
    let output = run(&mut generate(&["--requests", "/dev/zero"]), "");
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("line 1 has no end"), "{stderr}");
}

#[test]
fn the_output_of_other_commands_may_be_cut_off_too() {
    let mut child = super::program::loramux(&["--help"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert!(!first.is_empty());
    let output = child.wait_with_output().unwrap();
    assert!(!text(&output.stderr).contains("panicked"));
}
