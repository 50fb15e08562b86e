//! Signals end a batch without losing what is done.

use std::process::Command;

use super::program::{Running, SHORT, generate, ids, long};

/// A batch that has answered a short request and runs a long one; its input stays open.
fn under_way(flags: &[&str]) -> Running {
    let mut running = Running::start(&mut generate(&[&["--requests", "-", "-v"], flags].concat()));
    running.ask(SHORT);
    running.wait_for("line 1 is answered");
    running.ask(&long());
    running.wait_for("line 2 is taken in");
    running
}

#[test]
fn a_signal_writes_what_is_done_and_names_what_is_not() {
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let mut running = under_way(&[]);
        assert_eq!(running.answer()["id"], "short");
        // Its answer is there long before that of the line before it.
        running.ask(r#"{"id": "last", "input_ids": []}"#);
        running.wait_for("line 3 is taken in");
        running.signal(signal);
        let (found, answers, told) = running.end();
        assert_eq!(found, Some(code), "{told}");
        assert_eq!(ids(&answers), ["\"last\""]);
        assert!(told.contains("not answered: line 2 (id \"long\")"), "{told}");
        assert!(told.contains("whatever comes after line 3"), "{told}");
        assert!(told.contains("2 answers are written") && told.contains("summary: "), "{told}");
    }
}

#[test]
fn a_file_keeps_what_was_done_beside_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out.jsonl");
    std::fs::write(&output, "old\n").unwrap();
    let mut running = under_way(&["--output", output.to_str().unwrap()]);
    running.ask(r#"{"id": "last", "input_ids": []}"#);
    running.wait_for("line 3 is taken in");
    running.signal("TERM");
    let (code, _, told) = running.end();
    assert_eq!(code, Some(143), "{told}");
    assert_eq!(std::fs::read_to_string(&output).unwrap(), "old\n");
    let kept = told.split("the answers so far are in ").nth(1).unwrap().lines().next().unwrap();
    assert!(kept.ends_with(".partial"), "{kept}");
    let answers = std::fs::read_to_string(kept).unwrap();
    assert_eq!(ids(&answers), ["\"short\"", "\"last\""]);
}

#[test]
fn a_second_signal_ends_the_program_at_once() {
    let running = under_way(&[]);
    // A stopped process sees both at once when it goes on.
    running.signal("STOP");
    running.signal("INT");
    running.signal("TERM");
    running.signal("CONT");
    let (code, _, told) = running.end();
    assert!(matches!(code, Some(130 | 143)), "{code:?}");
    assert!(!told.contains("summary: ") && !told.contains("not answered"), "{told}");
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
    let (code, _, told) = running.end();
    // Whether the signal comes before the FIFO is waited for or after.
    assert!(matches!(code, None | Some(143)), "{code:?}: {told}");
}
