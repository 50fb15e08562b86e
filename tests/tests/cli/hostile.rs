//! Endless files, FIFOs without a writer, and huge numbers are refused at once.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use loramux::Exit;
use loramux_tests::{adapter_path, model_path, sources};
use serde_json::{Value, json};

use super::support::{Outcome, json_lines, llama, loramux};

/// Time limit of a refusal, generous for a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a command line on a separate thread, so that the test fails if it hangs.
fn in_time(words: &[&str], stdin: &[u8]) -> Outcome {
    let words: Vec<String> = words.iter().map(ToString::to_string).collect();
    let (command, stdin, (done, outcome)) = (words.join(" "), stdin.to_vec(), mpsc::channel());
    std::thread::spawn(move || {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let _ = done.send(loramux(&words, &stdin));
    });
    let waited = outcome.recv_timeout(PATIENCE);
    waited.unwrap_or_else(|error| panic!("{command}: {error}"))
}

/// Objects in place of a file.
fn no_files(dir: &Path) -> [PathBuf; 2] {
    let (fifo, endless) = (dir.join("a-fifo"), dir.join("an-endless-device"));
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    symlink("/dev/zero", &endless).unwrap();
    [fifo, endless]
}

/// A folder with links to the files of `from`, except that `name` links to `to`.
fn with_link(dir: &Path, from: &Path, name: &str, to: &Path) -> PathBuf {
    let made = tempfile::tempdir_in(dir).unwrap().keep();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != name {
            symlink(entry.path().canonicalize().unwrap(), made.join(entry.file_name())).unwrap();
        }
    }
    symlink(to, made.join(name)).unwrap();
    made
}

fn assert_refused(outcome: &Outcome, exits: &[Exit], name: &str) {
    let text = format!("{}{}", outcome.stdout, outcome.stderr);
    assert!(exits.contains(&outcome.exit), "{name}: {text}");
    assert!(text.contains(name) && text.contains("not a regular file"), "{name}: {text}");
}

#[test]
fn what_is_no_file_in_the_place_of_one_of_an_adapter_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = adapter_path("llama.attn-r8");
    for no_file in no_files(dir.path()) {
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            let bad = with_link(dir.path(), &adapter, name, &no_file);
            let bad = bad.to_str().unwrap();
            assert_refused(&in_time(&["inspect", bad], b""), &[Exit::Usage], name);
            let lora = json!({"lora_name": "a", "lora_int_id": 1, "lora_path": bad});
            let line = json_lines(&[json!({"prompt": "x", "lora_request": lora})]);
            let words = ["generate", "--model", &llama(), "--requests", "-"];
            assert_refused(&in_time(&words, &line), &[Exit::Refused], name);
        }
        // Instead of a safetensors file: an index, and a torch file.
        for name in ["adapter_model.safetensors.index.json", "adapter_model.bin"] {
            let bad = with_link(dir.path(), &adapter, name, &no_file);
            std::fs::remove_file(bad.join("adapter_model.safetensors")).unwrap();
            let outcome = in_time(&["inspect", bad.to_str().unwrap()], b"");
            assert_refused(&outcome, &[Exit::Usage], name);
        }
        let config = no_file.to_str().unwrap();
        let words = ["inspect", "--lora-config", config, adapter.to_str().unwrap()];
        let name = no_file.file_name().unwrap().to_str().unwrap();
        assert_refused(&in_time(&words, b""), &[Exit::Usage], name);
        let words = ["inspect", config];
        let outcome = in_time(&words, b"");
        assert!(outcome.exit != Exit::Fine && outcome.stdout.len() < 10_000);
    }
}

#[test]
fn what_is_no_file_in_the_place_of_one_of_a_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_path("llama");
    for no_file in no_files(dir.path()) {
        for name in [
            "config.json",
            "generation_config.json",
            "hf_quant_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "model.safetensors",
        ] {
            let bad = with_link(dir.path(), &model, name, &no_file);
            let words = ["generate", "--model", bad.to_str().unwrap(), "--prompt", "x"];
            assert_refused(&in_time(&words, b""), &[Exit::Model], name);
        }
        let name = "model.safetensors.index.json";
        let bad = with_link(dir.path(), &model, name, &no_file);
        std::fs::remove_file(bad.join("model.safetensors")).unwrap();
        let words = ["generate", "--model", bad.to_str().unwrap(), "--prompt", "x"];
        assert_refused(&in_time(&words, b""), &[Exit::Model], name);
        let adapter = adapter_path("llama.attn-r8");
        let bad = with_link(dir.path(), &model, "config.json", &no_file);
        let words = ["inspect", "--model", bad.to_str().unwrap(), adapter.to_str().unwrap()];
        assert_refused(&in_time(&words, b""), &[Exit::Model], "config.json");
    }
}

/// The text of a source file without its tests.
fn without_tests(source: &str) -> &str {
    source.split("#[cfg(test)]\nmod tests").next().unwrap()
}

#[test]
fn users_files_are_opened_by_the_one_reader_alone() {
    // The reader itself; the download cache; requests, which may come from a FIFO; answers, which are written.
    const ALLOWED: [&str; 4] = [
        "lora-core/src/files.rs",
        "cli/src/model_fetch.rs",
        "cli/src/commands/generate.rs",
        "cli/src/output.rs",
    ];
    const OPENING: [&str; 5] = [
        "fs::read(",
        "fs::read_to_string(",
        "read_to_string(path",
        "File::open(",
        "OpenOptions::new()",
    ];
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
    let of_crate = |name| sources(&crates.join(name).join("src"), &[".rs"]);
    let found: Vec<_> = ["lora-core", "engine", "cli"].into_iter().flat_map(of_crate).collect();
    assert!(found.len() > 100);
    for path in found {
        let name = path.to_str().unwrap();
        if ALLOWED.iter().any(|allowed| name.ends_with(allowed)) || name.ends_with("tests.rs") {
            continue;
        }
        let source = std::fs::read_to_string(&path).unwrap();
        let opened = OPENING.iter().find(|opening| without_tests(&source).contains(**opening));
        assert_eq!(opened, None, "{name}: read users' files by `lora_core::files`");
    }
}

/// Resident memory of this process in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

#[test]
fn no_number_of_a_flag_panics_hangs_or_takes_the_memory() {
    let model = llama();
    let adapter = adapter_path("llama.attn-r8");
    let adapter = format!("--adapter=a={}", adapter.display());
    for flag in [
        "--max-loras",
        "--max-lora-rank",
        "--threads",
        "--max-batch-size",
        "--max-num-tokens",
        "--max-seq-len",
        "--kv-cache-tokens",
        "--max-tokens",
        "--min-tokens",
        "--top-k",
        "--n",
        "--best-of",
        "--logprobs",
        "--prompt-logprobs",
        "--stop-token-id",
        "--free-gpu-memory-fraction",
        "--seed",
    ] {
        for value in ["0", "1", "65536", "1000000", "4294967296", "18446744073709551615", "-1"] {
            let flag = format!("{flag}={value}");
            let tokens =
                if flag.starts_with("--max-tokens") { "--seed=1" } else { "--max-tokens=2" };
            let words = [
                "generate", "--model", &model, "--prompt", "x", "--device", "cpu", &adapter,
                "--lora", "a", tokens, &flag,
            ];
            let before = resident();
            let outcome = in_time(&words, b"");
            let taken = resident().saturating_sub(before);
            assert!(taken < 1 << 30, "{flag}: {taken} bytes");
            if outcome.exit != Exit::Fine {
                let text = outcome.stderr + &outcome.stdout;
                assert!(!text.contains("panicked") && !text.is_empty(), "{flag}: {text}");
            }
        }
    }
}

#[test]
fn numbers_above_their_bounds_are_refused_with_the_bound() {
    for (flag, parts) in [
        ("--max-loras=1000000", &["max_loras", "1 to 65536"][..]),
        ("--max-loras=18446744073709551615", &["max_loras", "1 to 65536"]),
        ("--max-lora-rank=1000000", &["max_lora_rank", "1 to 65536"]),
        ("--threads=1000000", &["--threads is 1000000", "1 to "]),
        ("--max-batch-size=1000000", &["max_batch_size", "1 to 65536", "--max-batch-size"]),
        (
            "--kv-cache-tokens=1073741824",
            &["kv_cache_config.max_tokens", "--kv-cache-tokens", "free"],
        ),
    ] {
        let words = ["generate", "--model", &llama(), "--prompt", "x", "--device", "cpu", flag];
        let mut words = words.to_vec();
        if flag.starts_with("--max-lora") {
            words.extend(["--lora-config", LORA_CONFIG]);
        }
        let outcome = in_time(&words, b"");
        assert_eq!(outcome.exit, Exit::Usage, "{flag}: {}", outcome.stderr);
        for part in parts {
            assert!(outcome.stderr.contains(part), "{flag}: {}", outcome.stderr);
        }
        assert!(!outcome.stderr.to_lowercase().contains("gpu"), "{flag}: {}", outcome.stderr);
    }
}

/// Enables LoRA without an adapter.
const LORA_CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cli/empty.json");

fn answers(lines: &[Value]) -> (Exit, Vec<Value>) {
    let words = ["generate", "--model", &llama(), "--requests", "-", "--max-tokens=1"];
    let outcome = in_time(&words, &json_lines(lines));
    let answers = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap());
    (outcome.exit, answers.collect())
}

#[test]
fn a_prompt_that_cannot_fit_is_refused_by_its_bytes() {
    let mut line = json!({"prompt": "x ".repeat(4 << 20)});
    let (exit, refused) = answers(std::slice::from_ref(&line));
    let error = refused[0]["error"].as_str().unwrap();
    assert_eq!(exit, Exit::Refused);
    let parts = ["the prompt has 8388608 bytes", "at most ", "max_seq_len is 512", "shorten it"];
    assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    // The largest text that is tokenized is refused for its tokens, a longer one for its bytes.
    let limit: usize =
        error.split("at most ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    let just = json!({"prompt": "x".repeat(limit)});
    let over = json!({"prompt": "x".repeat(limit + 1)});
    let (_, refused) = answers(&[just, over]);
    let error = |at: usize| refused[at]["error"].as_str().unwrap();
    assert!(error(0).contains("tokens, but max_seq_len"), "{}", error(0));
    assert!(error(1).contains("bytes, but at most"), "{}", error(1));
    // With truncation to its end, a longer text is served, but only up to a limit.
    let cut = json!({"truncate_prompt_tokens": 4});
    let long = json!({"prompt": "x".repeat(limit + 1), "sampling": cut});
    line["sampling"] = cut;
    let (_, answered) = answers(&[long, line]);
    assert!(answered[0]["outputs"].is_array(), "{}", answered[0]);
    assert!(answered[1]["error"].as_str().unwrap().contains("8388608 bytes"), "{}", answered[1]);
}
