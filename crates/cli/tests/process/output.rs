//! `--output FILE`: written to a temporary file beside it, renamed at the end.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use super::program::{SHORT, generate, ids, run, text};

fn files(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.unwrap().file_name().into_string().unwrap()
    };
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

#[test]
fn a_complete_file_takes_the_place_of_the_old_one_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let (file, link) = (dir.path().join("out"), dir.path().join("link"));
    std::fs::write(&file, "old").unwrap();
    symlink(&file, &link).unwrap();
    let output =
        run(&mut generate(&["--requests", "-", "--output", link.to_str().unwrap()]), SHORT);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(ids(&std::fs::read_to_string(&file).unwrap()), ["\"short\""]);
    assert!(link.is_symlink());
    assert_eq!(files(dir.path()), ["link", "out"]);
}

#[test]
fn a_run_that_fails_before_its_answers_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("out");
    std::fs::write(&file, "old").unwrap();
    let words = ["--requests", "absent", "--output", file.to_str().unwrap()];
    let output = run(&mut generate(&words), "");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "old");
    assert_eq!(files(dir.path()), ["out"]);
}

#[test]
fn the_file_of_requests_cannot_be_that_of_answers_by_any_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("requests");
    let (link, hard) = (dir.path().join("link"), dir.path().join("hard"));
    std::fs::write(&file, SHORT).unwrap();
    symlink(&file, &link).unwrap();
    std::fs::hard_link(&file, &hard).unwrap();
    for answers in [&file, &link, &hard] {
        let words = ["--requests", file.to_str().unwrap(), "--output", answers.to_str().unwrap()];
        let output = run(&mut generate(&words), "");
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("the file of requests"), "{stderr}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), SHORT);
    }
    let mut command = generate(&["--requests", "-", "--output", file.to_str().unwrap()]);
    let output = command.stdin(std::fs::File::open(&file).unwrap()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), SHORT);
}

#[test]
fn what_is_no_regular_file_is_written_as_it_is() {
    let output = run(&mut generate(&["--requests", "-", "--output", "/dev/stdout"]), SHORT);
    assert_eq!(ids(&text(&output.stdout)), ["\"short\""]);
    let dir = tempfile::tempdir().unwrap();
    let output =
        run(&mut generate(&["--requests", "-", "--output", dir.path().to_str().unwrap()]), SHORT);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("it is a folder"));
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let reader = std::thread::spawn({
        let fifo = fifo.clone();
        move || std::fs::read_to_string(fifo).unwrap()
    });
    let words = ["--requests", "-", "--output", fifo.to_str().unwrap()];
    assert_eq!(run(&mut generate(&words), SHORT).status.code(), Some(0));
    assert_eq!(ids(&reader.join().unwrap()), ["\"short\""]);
    assert_eq!(files(dir.path()), ["fifo"]);
}
