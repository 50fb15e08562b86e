//! Signals end a batch without losing finished answers.

use std::process::Command;

use super::program::{Running, SHORT, generate, ids, long};

/// A batch that has finished a short request and is running a long one; its input stays open.
fn under_way(flags: &[&str]) -> Running {
    let mut running = Running::start(&mut generate(&[&["--requests", "-", "-v"], flags].concat()));
    running.ask(SHORT);
    running.wait_for("line 1 is answered");
    running.ask(&long());
    running.wait_for("line 2 is read");
    running
}

#[test]
fn a_signal_writes_what_is_done_and_names_what_is_not() {
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let mut running = under_way(&[]);
        assert_eq!(running.answer()["id"], "short");
        // It finishes long before the line before it.
        running.ask(r#"{"id": "last", "input_ids": []}"#);
        running.wait_for("line 3 is read");
        running.signal(signal);
        let (found, answers, stderr) = running.end();
        assert_eq!(found, Some(code), "{stderr}");
        assert_eq!(ids(&answers), ["\"last\""]);
        assert!(stderr.contains("not answered: line 2 (id \"long\")"), "{stderr}");
        assert!(stderr.contains("whatever comes after line 3"), "{stderr}");
        assert!(
            stderr.contains("2 answers are written") && stderr.contains("summary: "),
            "{stderr}"
        );
    }
}

#[test]
fn a_file_keeps_what_was_done_beside_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out.jsonl");
    std::fs::write(&output, "old\n").unwrap();
    let mut running = under_way(&["--output", output.to_str().unwrap()]);
    running.ask(r#"{"id": "last", "input_ids": []}"#);
    running.wait_for("line 3 is read");
    running.signal("TERM");
    let (code, _, stderr) = running.end();
    assert_eq!(code, Some(143), "{stderr}");
    assert_eq!(std::fs::read_to_string(&output).unwrap(), "old\n");
    let kept = stderr.split("the answers so far are in ").nth(1).unwrap().lines().next().unwrap();
    assert!(kept.ends_with(".partial"), "{kept}");
    let answers = std::fs::read_to_string(kept).unwrap();
    assert_eq!(ids(&answers), ["\"short\"", "\"last\""]);
}

#[test]
fn a_second_signal_ends_the_program_at_once() {
    let running = under_way(&[]);
    // A stopped process receives both at once when it continues.
    running.signal("STOP");
    running.signal("INT");
    running.signal("TERM");
    running.signal("CONT");
    let (code, _, stderr) = running.end();
    assert!(matches!(code, Some(130 | 143)), "{code:?}");
    assert!(!stderr.contains("summary: ") && !stderr.contains("not answered"), "{stderr}");
}

#[test]
fn a_fifo_that_nobody_reads_is_waited_for_until_a_signal_comes() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let words = ["--requests", "-", "--output", fifo.to_str().unwrap()];
    let mut running = Running::start(&mut generate(&words));
    running.wait_for("sampling");
    running.signal("TERM");
    let (code, _, stderr) = running.end();
    // The signal may arrive before or after the program blocks on the FIFO.
    assert!(matches!(code, None | Some(143)), "{code:?}: {stderr}");
}
