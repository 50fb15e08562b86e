//! Documents: all links are valid, and all commands are accepted.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use loramux_tests::{adapter_path, model_path};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The pages of the repository, at its root and in `docs`.
fn pages() -> Vec<PathBuf> {
    let markdown = |dir: PathBuf| {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|end| end == "md")).collect::<Vec<_>>()
    };
    let mut pages = markdown(root());
    pages.extend(markdown(root().join("docs")));
    pages.push(root().join("bench/evidence/README.md"));
    assert!(pages.len() > 10, "{pages:?}");
    pages
}

#[test]
fn links_point_to_existing_files() {
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://")) {
            let target = link.split('#').next().unwrap();
            let path = page.parent().unwrap().join(target);
            assert!(path.exists(), "{}: {link}", page.display());
        }
    }
}

/// Lines of shell blocks that call the program, except for those that leave flags out.
fn commands(text: &str) -> Vec<String> {
    let blocks = text.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let lines = blocks.flat_map(str::lines).filter(|line| line.starts_with("loramux "));
    let whole = lines.filter(|line| !line.contains("..."));
    whole.map(|line| line.split(" #").next().unwrap().trim().to_owned()).collect()
}

#[test]
fn commands_parse() {
    let mut count = 0;
    for page in pages() {
        for command in commands(&fs::read_to_string(&page).unwrap()) {
            let words = shlex::split(&command).unwrap().into_iter().map(OsString::from);
            if let Err(error) = loramux::args::parse(words) {
                panic!("{}: {command}: {error}", page.display());
            }
            count += 1;
        }
    }
    assert!(count >= 8, "{count} commands");
}

/// A folder with everything that the documents' commands name: a model with a chat template, requests, settings.
fn workplace() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("my-model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(model_path("llama")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    let template = "{% for message in messages %}{{ message.content }}{% endfor %}";
    fs::write(model.join("chat_template.jinja"), template).unwrap();
    let lines =
        "{\"prompt\": \"x\", \"lora\": \"sql\"}\n{\"prompt\": \"y\", \"lora\": \"pirate\"}\n";
    fs::write(dir.path().join("questions.jsonl"), lines).unwrap();
    fs::write(dir.path().join("config.yaml"), "max_batch_size: 4\nlora_config: {max_loras: 2}\n")
        .unwrap();
    dir
}

/// The word of a command with paths of this machine.
fn located(word: &str, dir: &Path) -> String {
    let path = |name: &str| dir.join(name).display().to_string();
    let adapter = |name| adapter_path(name).display().to_string();
    match word.rsplit_once('=') {
        Some((name, "my-adapter" | "a")) => return format!("{name}={}", adapter("llama.attn-r8")),
        Some((name, "b")) => return format!("{name}={}", adapter("llama.some-layers")),
        _ => (),
    }
    match word {
        "my-adapter" => adapter("llama.attn-r8"),
        "my-model" | "copy" | "questions.jsonl" | "config.yaml" => path(word),
        word => word.to_owned(),
    }
}

#[test]
fn commands_run() {
    let dir = workplace();
    let pages = pages();
    let texts = pages.iter().map(|page| fs::read_to_string(page).unwrap());
    let mut lines: Vec<String> = texts.flat_map(|text| commands(&text)).collect();
    // `diff` reads the copy that `convert` writes. The demo downloads a model.
    lines.sort();
    lines.dedup();
    lines.retain(|line| line != "loramux demo");
    assert!(lines.len() >= 5, "{lines:?}");
    for line in lines {
        let mut words: Vec<String> =
            shlex::split(&line).unwrap().iter().map(|word| located(word, dir.path())).collect();
        if words[1] == "generate" {
            words.extend(["--device", "cpu"].map(str::to_owned));
        }
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let mut streams = loramux::Streams {
            stdin: Box::new(std::io::empty()),
            stdout: &mut stdout,
            stdout_file: None,
            stderr: &mut stderr,
            live: false,
            quiet: false,
        };
        let exit = loramux::run(words.into_iter().map(OsString::from), &mut streams);
        let stderr = String::from_utf8_lossy(&stderr);
        assert_eq!(exit, loramux::Exit::Fine, "{line}: {stderr}");
        assert!(!stdout.is_empty(), "{line}");
    }
}
