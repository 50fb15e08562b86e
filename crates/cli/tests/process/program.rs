//! Helpers: start the program on a small fixture model and read what it writes.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::thread::{self, JoinHandle};

use serde_json::Value;

/// A request that finishes at once.
pub const SHORT: &str = r#"{"id": "short", "input_ids": [5, 6], "sampling": {"max_tokens": 1}}"#;

/// A request that takes longer than any test waits for: many outputs, so every step has many rows.
pub const LONG: &str = r#"{"id": "long", "input_ids": [5, 6],
    "sampling": {"max_tokens": 500, "n": 200, "temperature": 1, "ignore_eos": true}}"#;

/// The long request on one line.
pub fn long() -> String {
    LONG.replace('\n', "")
}

/// A path in `tests/fixtures`.
pub fn fixture(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures")).join(path)
}

/// The program with these arguments.
pub fn loramux(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loramux"));
    command.args(words).env_remove("RUST_LOG");
    command
}

/// `loramux generate` on the CPU with the fixture model `llama`.
pub fn generate(flags: &[&str]) -> Command {
    let mut command = loramux(&["generate", "--device", "cpu", "--dtype", "float32", "--model"]);
    command.arg(fixture("models/llama")).args(flags);
    command
}

/// Runs a program to its end, with `stdin` as its input.
pub fn run(command: &mut Command, stdin: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // Fails if the program ends before it has read everything.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

/// Output as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The `id` of each answer; every line must be whole.
pub fn ids(lines: &str) -> Vec<String> {
    assert!(lines.is_empty() || lines.ends_with('\n'), "{lines}");
    let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["id"].to_string();
    lines.lines().map(id).collect()
}

/// A running program with pipes to all its streams.
pub struct Running {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    pub stdout: Option<BufReader<ChildStdout>>,
    pub stderr: BufReader<ChildStderr>,
    stderr_read: String,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Self {
            stdin: child.stdin.take(),
            stdout: child.stdout.take().map(BufReader::new),
            stderr: BufReader::new(child.stderr.take().unwrap()),
            child,
            stderr_read: String::new(),
        }
    }

    /// Writes a request line.
    pub fn ask(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Waits for the next answer line.
    pub fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.stdout.as_mut().unwrap().read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line:?}: {}", self.rest()))
    }

    /// Waits for a line on standard error that contains `part`.
    pub fn wait_for(&mut self, part: &str) {
        loop {
            let mut line = String::new();
            let read = self.stderr.read_line(&mut line).unwrap();
            self.stderr_read.push_str(&line);
            assert!(read > 0, "{part} is not in: {}", self.stderr_read);
            if line.contains(part) {
                return;
            }
        }
    }

    /// Sends the signal of this name.
    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    /// Waits for the end; returns the exit code, the remaining answers and everything on standard error.
    pub fn end(mut self) -> (Option<i32>, String, String) {
        let answers = self.stdout.take().map(drained);
        let stderr = self.rest();
        let code = self.child.wait().unwrap().code();
        drop(self.stdin.take());
        (code, answers.map(|answers| answers.join().unwrap()).unwrap_or_default(), stderr)
    }

    /// Everything on standard error, to the end.
    fn rest(&mut self) -> String {
        self.stderr.read_to_string(&mut self.stderr_read).unwrap();
        std::mem::take(&mut self.stderr_read)
    }
}

/// Reads a stream to its end on a thread.
fn drained(mut stream: BufReader<ChildStdout>) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    })
}
